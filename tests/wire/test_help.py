"""The command line as `--help` tells it, command by command."""

from collections.abc import Iterator

import pytest
import typer
import typer.main

from registry.cli.main import app
from tests.scenarios.world import Cli
from tests.wire import snapshots


def commands(group: object, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every command and group below `group`, the group first."""
    yield path
    for name, command in sorted(getattr(group, "commands", {}).items()):
        yield from commands(command, (*path, name))


def test_help_of_every_command_is_the_one_in_the_snapshot() -> None:
    cli = Cli({"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"})
    pages = []
    for path in commands(typer.main.get_command(app)):
        page = cli.ok(*path, "--help").out
        pages.append(f"$ adaptory {' '.join((*path, '--help'))}\n{page.strip()}\n")
    snapshots.check("help.txt", "\n\n".join(pages))


@pytest.mark.parametrize(
    "arguments", [("no-such-command",), ("push",), ("search", "--max-rank", "many"), ("--no-such",)]
)
def test_a_wrong_command_line_is_exit_code_2(arguments: tuple[str, ...]) -> None:
    ran = Cli({})(*arguments)
    assert ran.code == 2
    assert ran.out == ""
    assert ran.err
