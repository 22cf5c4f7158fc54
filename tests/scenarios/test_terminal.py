"""What others wrote does not speak to the terminal, nor look like a message of ours."""

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
        if ran.code != 2:  # a command that there is
            shown.append(ran)
    shown.append(cli("promote", "acme/sql:1.0.0", "--to", "prod"))
    assert len(shown) >= 6
    for ran in shown:
        text = ran.out + ran.err
        assert not {"\x1b", "\x07", "\r"} & set(text), text
        assert not [line for line in text.splitlines() if line.startswith("error: all")], text
    assert "\\x1b[31m" in shown[1].out
