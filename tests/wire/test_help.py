"""The command line as `--help` tells it, command by command."""

import shlex
from collections.abc import Iterator

import pytest
import typer
import typer.main

from registry.cli.start import load_commands
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
    for path in commands(typer.main.get_command(load_commands())):
        page = cli.ok(*path, "--help").out
        pages.append(f"$ adaptory {' '.join((*path, '--help'))}\n{page.strip()}\n")
    snapshots.check("help.txt", "\n\n".join(pages))


def test_every_command_has_an_example_that_it_takes_and_a_text_for_each_option_within_80_columns() -> None:
    adaptory = typer.main.get_command(load_commands())
    for path in commands(adaptory):
        page = Cli({"COLUMNS": "80", "NO_COLOR": "1"}).ok(*path, "--help").out.partition("\n")[2]
        assert [line for line in page.splitlines() if len(line) > 80 or line.endswith("...")] == [], path
        group, command = adaptory, adaptory
        for name in path:
            group, command = command, command.commands[name]  # type: ignore[attr-defined]
        if hasattr(command, "commands"):
            continue
        silent = [
            param.name for param in command.params if not getattr(param, "help", "") and not getattr(param, "hidden", 0)
        ]
        assert silent == [], path
        example = page.partition("\n  Example:\n")[2].replace("\\\n", " ")
        words = shlex.split(example)
        assert words[: len(path) + 1] == ["adaptory", *path], page
        parent = group.make_context("adaptory", [path[-1]])
        assert command.make_context(path[-1], words[len(path) + 1 :], parent), "its options and arguments are right"


@pytest.mark.parametrize(
    "arguments", [("no-such-command",), ("push",), ("search", "--max-rank", "many"), ("--no-such",)]
)
def test_a_wrong_command_line_is_exit_code_2(arguments: tuple[str, ...]) -> None:
    ran = Cli({})(*arguments)
    assert ran.code == 2
    assert ran.out == ""
    assert ran.err
