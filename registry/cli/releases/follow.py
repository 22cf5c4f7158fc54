"""Follows channels, with a line or a command for each change."""

import os
import subprocess
import sys
from datetime import UTC, datetime
from json import dumps
from typing import TYPE_CHECKING, Annotated

import typer

from registry.cli.console import complete, render
from registry.cli.console.connect import connected
from registry.cli.console.groups import root
from registry.cli.console.render import JsonFlag
from registry.errors import Unavailable

if TYPE_CHECKING:
    from registry.client.follow import ChannelChange

Channels = Annotated[
    list[str],
    typer.Argument(metavar="REPO@CHANNEL...", help="Such as acme/sql@prod.", autocompletion=complete.channels),
]
Command = Annotated[
    str | None,
    typer.Option(
        "--exec",
        metavar="CMD",
        help="A shell command to run at each change, with FOLLOWED_CHANNEL, _VERSION, _COMMIT, _MOVE and "
        "_BEFORE (the version before) in its environment.",
    ),
]


@root.command()
def follow(channels: Channels, command: Command = None, json: JsonFlag = False) -> None:
    """Print what channels serve, then a line for each change, until interrupted."""
    from registry.client.follow import follow as changes

    with connected() as connection:
        for change in changes(connection.api, channels, _outage):
            _show(change, json)
            if command is not None:
                _run(command, change)


def _outage(error: Unavailable | None) -> None:
    render.say("The registry answers again." if error is None else f"{error.detail} Trying again.")


def _show(change: "ChannelChange", as_json: bool) -> None:
    now, before = change.now, change.before
    if as_json:
        served = {"move": None, "version": None, "commit": None} if now is None else now.model_dump()
        print(dumps({"channel": change.channel, **served, "before": before.version if before else None}))
    else:
        at, served = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S"), now.version if now else None
        instead = f", after {before.version or 'nothing'}" if before else ""
        render.out(f"{at} {change.channel} serves {served or 'nothing'}{instead}")
    sys.stdout.flush()


def _run(command: str, change: "ChannelChange") -> None:
    """Runs the command and prints its failure. The next change runs it again."""
    now, before = change.now, change.before
    facts = {
        "CHANNEL": change.channel,
        "VERSION": now.version if now else None,
        "COMMIT": now.commit if now else None,
        "MOVE": now.move if now else None,
        "BEFORE": before.version if before else None,
    }
    own = {f"FOLLOWED_{name}": "" if value is None else str(value) for name, value in facts.items()}
    code = subprocess.run(command, shell=True, check=False, env=os.environ | own).returncode  # noqa: S602
    if code:
        render.say(f"The command for {change.channel} ended with {code}: {command}")
