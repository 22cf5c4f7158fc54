"""Channels: the question before a new one is created, and channel delete."""

import sys
from contextlib import suppress
from typing import Annotated, Any

import typer

from registry.cli.console import render
from registry.cli.console.connect import connected
from registry.cli.console.groups import group
from registry.cli.console.render import JsonFlag
from registry.cli.releases.release import Channel
from registry.errors import NotFound, Usage
from registry.formats.references import parse_channel_reference
from registry.sdk.connection import Connection

Json = dict[str, Any]
NewChannel = Annotated[
    bool, typer.Option("--new-channel", help="The channel may be new, though the repository has others.")
]
_LISTED = 10

channel_app = group("channel", "Channels of a repository.")


def confirm_new_channel(connection: Connection, line: str, channel: str, *, agreed: bool) -> None:
    """Says that a promotion creates the channel, if it does; `line` is the repository's route. Where the repository has
    other channels, the name may be misspelt: asks on a terminal, and raises Usage elsewhere, unless `agreed`."""
    known: list[str] = []
    with suppress(NotFound):
        known = sorted(connection.api.get(line)["channels"])
    if channel in known or (known and connection.api.get(f"{line}/channels/{channel}/policy")["revision"]):
        return  # or somebody has set its policy
    listed = ", ".join(known[:_LISTED]) + (", …" if len(known) > _LISTED else "")
    message = f"creates channel {channel}" + (f"; channels here: {listed}" if known else "")
    if known and not agreed and not _agrees(message):
        raise Usage(
            "channel_new",
            f"This {message}.",
            subject=channel,
        )
    render.say(message)


def _agrees(message: str) -> bool:
    if not (sys.stdin and sys.stdin.isatty() and sys.stderr and sys.stderr.isatty()):
        return False
    return typer.confirm(f"This {message}. Go on?", err=True)


@channel_app.command()
def delete(
    channel: Channel,
    serving: Annotated[
        str | None, typer.Option("--serving", metavar="VERSION", help="The release that it serves, if it serves one.")
    ] = None,
    reason: Annotated[str, typer.Option("--reason", help="Why; kept in the history and the audit log.")] = "",
    json: JsonFlag = False,
) -> None:
    """Delete a channel without a policy, such as one with a misspelt name.

    A channel that serves a release is refused: its clients would find nothing. If it has none, an admin may delete it
    with --serving and --reason.
    """
    repository, name = parse_channel_reference(channel)
    with connected() as connection:
        path = f"{connection.api.repository_path(str(repository))}/channels/{name}"
        document = connection.api.delete(path, serving=serving, reason=reason)
    served = f", which served {document['served']}" if document["served"] else ""
    render.document(document, json, lambda: render.out(f"deleted {channel}{served}"))
