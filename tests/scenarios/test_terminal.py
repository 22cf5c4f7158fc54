"""Text written by others does not control the terminal, nor imitate our messages."""

import io
import json
import re
import sys
import time

import pytest

from registry.cli.console import render
from tests.scenarios.world import Cli, World

HOSTILE = "bad\nerror: all is lost\r\x1b[31m\x1b]0;title\x07"


def test_notes_and_reasons_with_line_breaks_and_escapes_are_shown_and_not_obeyed(
    stocked_embedded: Cli, world: World
) -> None:
    cli = stocked_embedded
    cli.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny", "--notes", HOSTILE)
    cli.ok("promote", "acme/sql:1.0.0", "--to", "prod", "--reason", HOSTILE)
    shown = [cli.ok("yank", "acme/sql:1.0.0", "--reason", HOSTILE)]
    for command in (
        ("show", "acme/sql:1.0.0"),
        ("log", "acme/sql"),
        ("history", "acme/sql@prod"),
        ("audit", "--namespace", "acme"),
        ("resolve", "acme/sql:1.0.0"),
    ):
        ran = cli(*command)
        if ran.code != 2:  # an existing command
            shown.append(ran)
    shown.append(cli("promote", "acme/sql:1.0.0", "--to", "prod"))
    assert len(shown) >= 6
    for ran in shown:
        text = ran.out + ran.err
        assert not {"\x1b", "\x07", "\r"} & set(text), text
        assert not [line for line in text.splitlines() if line.startswith("error: all")], text
    assert "\\x1b[31m" in shown[1].out


def test_a_json_document_has_escapes_for_what_speaks_to_a_terminal_and_reads_back_the_same(
    stocked_embedded: Cli, world: World
) -> None:
    """JSON escapes ESC itself, but neither control characters above ASCII (U+009B begins a sequence like ESC [) nor
    characters that reverse the direction of a text."""
    cli, notes = stocked_embedded, "red\u009b31m \u202efdp.exe \x7f é 漢 \U000e0041\x1b"
    cli.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny", "--notes", notes)
    cli.ok("promote", "acme/sql:1.0.0", "--to", "prod", "--reason", notes)
    shown, refused = cli.ok("show", "acme/sql:1.0.0", "--json"), cli("show", f"acme/{notes}", "--json")
    assert json.loads(shown.out)["notes"] == notes
    assert notes in json.loads(refused.out)["error"]["subject"]
    export = cli.ok("audit", "--namespace", "acme", "--jsonl")
    assert notes in [json.loads(line)["reason"] for line in export.out.splitlines()]
    assert "é 漢" in shown.out
    for text in (shown.out, refused.out, export.out):
        assert all(character.isprintable() or character == "\n" for character in text)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    return terminal


def test_the_label_of_a_bar_is_shown_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = bar_on_a_terminal(monkeypatch)
    with render.progress("compose", 2, unit="steps") as done:
        done.step("[/red] \x1b]0;title\x07 [bold]merge", 0, 2, "steps")
        done(1)
    assert "[/red]" in terminal.getvalue()
    assert "]0;title\x07" not in terminal.getvalue()


def test_two_amounts_at_one_moment_are_no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = bar_on_a_terminal(monkeypatch)
    with render.progress("eval", 32, unit="examples") as done:
        time.sleep(1.2)
        done(8)
        done(8)
    rates = re.findall(r"16/32 examples ([\d.e+]+)/s", terminal.getvalue())
    assert rates
    assert all(5 < float(rate) < 16 for rate in rates)
