"""Output for people fits 80 columns, breaks no word, and is complete with --wide; the shell completes names."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from registry.cli.console import render
from tests.scenarios.terminal import one_after_another
from tests.scenarios.world import Cli, World, environment

LONG = "model.layers.17.self_attn.some_very_long_module_name_of_a_tower.q_proj"


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    """An earlier command of a test may have requested wide tables."""
    monkeypatch.setattr(render, "wide", False)


@pytest.fixture
def busy(stocked_on_disk: Cli, world: World) -> Cli:
    cli = stocked_on_disk
    notes = "A release whose notes are longer than a line of a terminal can be, and so have to be wrapped somewhere."
    cli.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny", "--notes", notes, "--channel", "prod")
    cli.ok("push", world.base, "acme/merged:1.0.0", "--base", "tiny", "--kind", "model")
    cli.ok("eval", "acme/sql", "--suite", "sql-exact", "--suite", "guard-exact")
    cli.ok("gate", "acme/sql@prod", "--rule", "sql-exact.accuracy >= 0", "--rule", "guard-exact.nll <= 10000")
    return cli


def test_every_list_fits_80_columns_and_is_whole_with_wide(busy: Cli, world: World) -> None:
    for command in (
        ("list",), ("log", "acme/sql"), ("show", "acme/sql"), ("show", "acme/sql", "--modules"), ("search",),
        ("history", "acme/sql@prod"), ("gate", "acme/sql@prod"), ("audit",), ("jobs",), ("base", "list"),
        ("base", "show", "tiny"), ("suite", "list"), ("namespace", "list"), ("token", "list"), ("profile", "list"),
        ("inspect", "acme/sql"), ("inspect", world.adapters["terraform"]), ("whoami",),
        ("diff", "acme/sql", "acme/sql"),
    ):  # fmt: skip
        narrow = busy.ok(*command).out
        for line in narrow.splitlines():
            words = line.split()
            assert len(line) <= 80 or len(words) <= 2, f"{command}: {line}"
        wide = busy.ok(*command, "--wide").out
        lacking = {*re.findall(r"\w{5,}", wide)} - {*re.findall(r"\w{5,}", narrow)}
        assert lacking <= {"release", "module", "server", "suite", "channel", "repository", "self_attn"}, (
            "a record has its first column as its heading, and modules are cut"
        )


@pytest.mark.long
def test_on_a_terminal_of_80_columns_no_line_is_longer(busy: Cli, world: World, tmp_path: Path) -> None:
    busy.ok("push", world.adapters["terraform"], "acme/a-terraform-adapter:1.0.0", "--base", "tiny")
    recipe = tmp_path / "recipe.yaml"
    inputs = [{"adapter": "acme/sql"}, {"adapter": "acme/a-terraform-adapter"}]
    content = {"inputs": inputs, "method": "stack", "adapter": "acme/sql-and-terraform:1.0.0", "probe": 0}
    recipe.write_text(yaml.safe_dump({**content, "evaluate": ["sql-exact"], "gates": ["sql-exact.nll <= 10000"]}))
    commands = (
        ("compose", recipe, "--plan"), ("compose", recipe), ("conflicts", "acme/sql", "acme/a-terraform-adapter"),
        ("conflicts", "acme/sql", "acme/a-terraform-adapter", "--explain"), ("show", "acme/sql"), ("search",),
        ("show", "acme/sql-and-terraform"), ("diff", "acme/sql", "acme/sql-and-terraform"), ("audit", "--limit", "5"),
        ("eval", "acme/a-terraform-adapter", "--suite", "terraform-exact"), ("history", "acme/sql@prod"), ("jobs",),
        ("inspect", "acme/a-terraform-adapter"), ("fsck", "--full"), ("show", "acme/nothing-of-such-a-long-name"),
    )  # fmt: skip
    for command, (status, lines) in zip(commands, one_after_another(busy, commands), strict=True):
        assert status in (0, 1, 3), (command, lines)
        assert len(lines) >= 2, (command, lines)
        assert [line for line in lines if len(line.rstrip()) > 80] == [], command


def test_models_are_listed_beside_adapters_and_scores_have_a_line_each(busy: Cli) -> None:
    assert [row["kind"] for row in busy.json("list")["items"]] == ["adapter", "model"]
    assert [row["kind"] for row in busy.json("list", "--models")["items"]] == ["model"]
    shown = busy.ok("log", "acme/sql").out
    lines = [line for line in shown.splitlines() if " accuracy " in line or " nll " in line]
    assert len(lines) == 4, "metrics have the names that rules use"


def test_an_audit_shows_before_and_after_in_full(busy: Cli) -> None:
    shown = busy.ok("audit", "--event", "gate:set").out
    assert "sql-exact.accuracy >= 0, guard-exact.nll <= 10000" in " ".join(shown.split()).replace("rules ", "")
    assert "..." not in shown
    for event, words in (("score:record", ("sql-exact", "nll")), ("suite:add", ("from",))):
        shown = busy.ok("audit", "--event", event).out
        assert all(word in shown for word in words), shown


def test_a_module_is_cut_in_the_middle_before_a_table_becomes_records(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    render.table("", ("module", "rank"), [(LONG, 8), ("short", 16)])
    header, cut, short = capsys.readouterr().out.splitlines()
    assert (len(header), len(cut), len(short)) == (60, 60, 60)
    assert cut.startswith("model.layers.17.")
    assert "…" in cut
    assert cut.endswith("q_proj     8")
    render.table("", ("name", "what"), [(LONG, "one two three four")])
    assert capsys.readouterr().out.splitlines() == [LONG, "  what  one two three four"]
    monkeypatch.setattr(render, "wide", True)
    render.table("", ("module", "what"), [(LONG, "x" * 90)])
    assert f"{LONG}  {'x' * 90}" in capsys.readouterr().out


def test_modules_that_differ_in_their_middle_only_stay_apart_when_they_are_cut(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "32")
    names = [f"model.layers.{layer}.self_attn.q_proj" for layer in (20, 21)]
    render.table("", ("module", "rank"), [(name, 8) for name in names])
    _, first, second = capsys.readouterr().out.splitlines()
    assert (len(first), "…" in first, first != second) == (32, True, True)


COMPLETIONS = {
    "show acme/s": "acme/sql",
    "show acme/sql:": "acme/sql:1.0.0",
    "pull acme/sql@": "acme/sql@prod",
    "history acme/": "acme/sql@prod",
    "promote acme/sql --to p": "prod",
    "eval acme/sql --suite guard": "guard-exact",
    "search --base ti": "tiny",
    "merge --method tie": "ties",
}
COMPLETE = """
import os, sys
from registry.cli.start import run
for words in sys.argv[1:]:
    os.environ.update(COMP_WORDS=f"adaptory {words}", COMP_CWORD=str(len(words.split())))
    try:
        run()
    except SystemExit:
        print("end", flush=True)
"""


@pytest.mark.long
def test_the_shell_completes_references_channels_suites_and_methods(busy: Cli) -> None:
    """All in one process, whereas a shell starts one for each."""
    with environment(busy.environment, []):
        given = os.environ | {"_ADAPTORY_COMPLETE": "complete_bash"}
        command = [sys.executable, "-c", COMPLETE, *COMPLETIONS]
        ran = subprocess.run(command, env=given, capture_output=True, text=True, check=False)
    answers = [answer.split() for answer in ran.stdout.split("end\n")[:-1]]
    for (words, expected), answer in zip(COMPLETIONS.items(), answers, strict=True):
        assert expected in answer, (words, ran)


def test_the_version_is_shown_and_commands_stand_in_groups_with_an_example_each(on_disk: Cli, tmp_path: Path) -> None:
    assert re.fullmatch(r"adaptory \d+\.\d+\.\d+\S*\n", on_disk.ok("--version").out)
    shown = on_disk.ok("--help").out
    for group in ("Release", "Find", "Compose", "Serve", "Operate", "Admin"):
        assert f"\n{group}:\n" in shown
    assert shown.count("  Example: adaptory ") == 6
    assert "Other:" not in shown
    assert max(map(len, shown.splitlines())) <= 80
