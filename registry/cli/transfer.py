"""Bytes in and out: push and pull."""

from pathlib import Path
from typing import Annotated, Any

import typer

from registry.cli import render
from registry.cli.connect import connected, resolved
from registry.cli.release import promote_release, show_move
from registry.cli.render import JsonFlag
from registry.errors import Usage, refuse_errors
from registry.names import parse_part, parse_reference

Json = dict[str, Any]


def register(root: typer.Typer) -> None:
    for command in (push, pull):
        root.command()(command)


def push(  # noqa: PLR0913
    directory: Annotated[
        Path, typer.Argument(help="What training wrote: adapter_config.json and adapter_model.safetensors.")
    ],
    target: Annotated[str, typer.Argument(metavar="REPO[:VERSION]")],
    base: Annotated[
        str | None, typer.Option(help="The base it was trained on; from adapter_config.json if that names one.")
    ] = None,
    bump: Annotated[str | None, typer.Option(help="patch, minor or major, instead of a version.")] = None,
    notes: Annotated[str, typer.Option(help="What is new in this release.")] = "",
    channel: Annotated[str | None, typer.Option(help="Promote it to this channel afterwards.")] = None,
    json: JsonFlag = False,
) -> None:
    """Check an adapter against its base, upload what is missing, publish a release."""
    from composer.formats.inspection import inspect as look
    from registry.client import transfer

    reference = parse_reference(target)
    if reference.range or reference.channel or reference.commit or bool(reference.version) == bool(bump):
        raise Usage(
            "bad_target",
            f"{target} with --bump {bump} names no single version.",
            next_step="Write REPO:VERSION, or REPO and --bump.",
        )
    if channel:
        parse_part(channel, "channel")  # before a release is out that cannot be taken back
    with connected() as connection:
        base = base or look(directory, None).facts.base_model_name_or_path
        if not base:
            raise Usage(
                "base_missing",
                f"{directory} does not say what base it was trained on.",
                next_step="Name it with --base.",
            )
        refuse_errors(look(directory, connection.api.architecture(base)).findings, str(directory))
        files = transfer.collect(directory)
        request = {
            "version": str(reference.version) if reference.version else None,
            "bump": bump,
            "base": base,
            "notes": notes,
        }
        with render.progress(f"push {target}", sum(file.manifest.size_bytes for file in files)) as done:
            published = transfer.push(connection.api, files, reference.repository, "adapter", request, done)
        move = promote_release(connection, published["release"], channel, "", force=False) if channel else None
    for finding in published["warnings"]:
        render.say(f"warning: {finding['message']}")
    render.document({**published, "move": move}, json, lambda: _show_push(published, move))


def pull(
    ref: Annotated[str, typer.Argument()],
    output: Annotated[Path, typer.Option("-o", "--output", help="A new directory.")],
    json: JsonFlag = False,
) -> None:
    """Fetch a release, every file verified; an interrupted pull goes on where it stopped."""
    from registry.client import transfer

    with connected() as connection:
        release = resolved(connection, ref)
        with render.progress(f"pull {ref}", sum(row["size_bytes"] for row in release["files"])) as done:
            transfer.pull(connection.api, release, output, done)
    told = {
        "repository": release["repository"],
        "version": release["version"],
        "commit": release["commit"],
        "directory": str(output),
    }
    render.document(
        told, json, lambda: print(f"{release['repository']}:{release['version']} {release['commit']} -> {output}")
    )


def _show_push(published: Json, move: Json | None) -> None:
    release, new = published["release"], "published" if published["created"] else "already there, nothing to do:"
    print(f"{new} {release['repository']}:{release['version']} {release['commit'][:12]} on {release['base']['name']}")
    if move:
        show_move(move)
