"""docs/reference/cli.md, from the tree of commands."""

import re
from collections.abc import Iterator
from typing import Any

import typer.main

from registry.cli.console.groups import GROUPS
from registry.cli.start import load_commands
from tests.wire.reference.markdown import code, fence, joined, plain, table

HEAD = """# Command line

Every command of `adaptory`, as `--help` shows it. This page is made from the commands themselves: `make snapshots`
writes it.

References are `acme/sql` (the highest stable release), `acme/sql:1.2.0`, `acme/sql:^1.2` (npm's ranges),
`acme/sql@prod` (a channel) and `acme/sql#1a2b3c4` (a commit). Results are on stdout, progress and warnings on stderr.
`--json` prints one document.

"""
EXITS = """## Exit codes

| code | meaning |
|---|---|
| 0 | done |
| 1 | refused by a check or a gate |
| 2 | usage: an unknown command or option, or a value of the wrong form |
| 3 | not found |
| 4 | conflict |
| 5 | not allowed |
| 6 | invalid input |
| 7 | unavailable |

[Errors](errors.md) lists every code of an error with its exit code.
"""


def page() -> str:
    adaptory: Any = typer.main.get_command(load_commands())
    context = adaptory.make_context("adaptory", [], resilient_parsing=True)
    parts = [HEAD, _options(adaptory, context, "Global options")]
    for title, names, _ in GROUPS:
        parts.append(f"## {title}\n\n")
        for name in names:
            parts += _commands(adaptory.commands[name], ("adaptory", name), context)
    return joined(*parts, EXITS)


def _commands(command: Any, path: tuple[str, ...], parent: Any) -> Iterator[str]:
    """The command, or each command of a group. Commands keep the first help option that they make, which `parent`
    decides."""
    if getattr(command, "hidden", False):
        return
    if hasattr(command, "commands"):
        for name, below in sorted(command.commands.items()):
            yield from _commands(below, (*path, name), parent)
        return
    context = command.make_context(path[-1], [], parent, resilient_parsing=True)
    usage = " ".join([*path, *command.collect_usage_pieces(context)])
    yield f"### {' '.join(path)}\n\n{plain(_paragraphs(command.help))}\n\n{code(usage)}\n\n"
    yield _options(command, context)
    if example := re.sub(r"^\W*Example:\n", "", command.epilog or ""):
        yield fence("\n".join(line.removeprefix("  ") for line in example.splitlines())) + "\n"


def _paragraphs(text: str) -> str:
    return "\n\n".join(" ".join(part.split()) for part in text.replace("\b", "").split("\n\n"))


def _options(command: Any, context: Any, title: str = "") -> str:
    rows = []
    for param in command.params:
        record = None if getattr(param, "hidden", False) else param.get_help_record(context)
        if record is not None and param.name not in ("json_output", "install_completion", "show_completion"):
            rows.append((code(record[0]), plain(record[1])))
    heading = f"## {title}\n\n" if title and rows else ""
    return heading + (table(("argument or option", "meaning"), rows) + "\n" if rows else "")
