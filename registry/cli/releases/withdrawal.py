"""Withdrawals: yank, unyank, takedown, deprecate."""

from typing import Annotated

import typer

from registry import wire
from registry.cli.console import complete, render
from registry.cli.console.connect import connected, resolved
from registry.cli.console.groups import root
from registry.cli.console.render import JsonFlag
from registry.cli.operations.changes import made_or_requested
from registry.cli.releases.release import Ref, deprecation_words
from registry.cli.releases.rollout import loaded_on, show_sets
from registry.errors import RegistryError, Usage
from registry.formats.references import parse_reference
from registry.sdk.connection import Connection

Why = Annotated[str, typer.Option("--reason", help="Why; required.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only print what each channel would serve.")]
WhyDeprecated = Annotated[str | None, typer.Option("--reason", help="Why it should not be used any more.")]
Undo = Annotated[bool, typer.Option("--undo", help="Undo a deprecation instead.")]


@root.command()
def yank(ref: Ref, reason: Why = "", dry_run: DryRun = False, json: JsonFlag = False) -> None:
    """Exclude a release from resolution; its exact version still resolves, with a warning."""
    _need_reason("A yank", ref, reason)
    with connected() as connection:
        release = _withdraw(connection, f"{_exactly(connection, ref).path}/yank", reason, dry_run=dry_run)
    if dry_run:
        render.document(release, json, lambda: None)
        return
    render.document(release, json, lambda: render.out(f"yanked {release.name}: {reason}"))


def _withdraw(connection: Connection, path: str, reason: str, *, dry_run: bool) -> wire.catalog.WithdrawnOut:
    """Yanks or unyanks, after printing what each channel will serve; with `dry_run`, only prints it."""
    try:
        preview = connection.api.post(path, {"reason": reason, "dry_run": True}, wire.catalog.WithdrawnOut)
    except RegistryError as error:
        if dry_run or error.subject != "body.dry_run":
            raise
        return connection.api.post(path, {"reason": reason}, wire.catalog.WithdrawnOut)  # an older server
    for change in preview.channels:
        channel = f"{preview.repository}@{change.channel}"
        would = "would serve" if dry_run else "will serve"
        render.say(f"{channel} {would} {change.after or 'nothing'} instead of {change.before or 'nothing'}")
    if not preview.channels:
        render.say("no channel would serve another release" if dry_run else "no channel will serve another release")
    if nodes := loaded_on(preview.loaded_on):
        render.say(f"loaded on {nodes}")
    show_sets(preview.sets, "has it as a member, and goes on serving it")
    return preview if dry_run else connection.api.post(path, {"reason": reason}, wire.catalog.WithdrawnOut)


@root.command()
def unyank(ref: Ref, reason: Why = "", dry_run: DryRun = False, json: JsonFlag = False) -> None:
    """Undo a yank."""
    _need_reason("An unyank", ref, reason)
    with connected() as connection:
        before = _exactly(connection, ref, warned=True)
        release = _withdraw(connection, f"{before.path}/unyank", reason, dry_run=dry_run)
    if dry_run:
        render.document(release, json, lambda: None)
        return
    line = f"unyanked {release.name}: {reason}" if before.yanked else f"{release.name} is not yanked: nothing to do"
    render.document(release, json, lambda: render.out(line))


def _need_reason(act: str, ref: str, reason: str) -> None:
    """Raises Usage for a blank reason, in the words of the server."""
    if not reason.strip():
        raise Usage("reason_missing", f"{act} needs a reason.", subject=ref)


@root.command()
def takedown(
    ref: Ref,
    reason: Annotated[str, typer.Option("--reason", help="Why; the tombstone shows it.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be removed.")] = False,
    json: JsonFlag = False,
) -> None:
    """Remove a release's files for good: leaked or illegal content. A tombstone and the audit log stay.

    Versions with the same files go with it, and the namespace cannot publish them or their weights again.
    """
    with connected() as connection:
        body = {"reason": reason, **({"dry_run": True} if dry_run else {})}
        release = _exactly(connection, ref)
        taken = made_or_requested(
            connection,
            release.repository.partition("/")[0],
            {"kind": "takedown", "release": f"{release.repository}:{release.version}", "reason": reason},
            lambda: connection.api.post(f"{release.path}/takedown", body, wire.catalog.TakedownOut),
            json=json,
        )

    def show() -> None:
        for name in taken.releases:
            render.out(f"{'would take' if dry_run else 'took'} down {name}: {reason}")
        gone = "would be gone" if dry_run else "gone"
        render.out(f"{render.counted(taken.blobs, 'blob')} {gone} for good ({render.size(taken.size_bytes)})")
        for path in taken.barred:
            render.out(f"{path}: these weights {'could not' if dry_run else 'cannot'} be published here again")
        for name in taken.named_by:
            files = ", ".join(taken.kept_files.get(name, ())) or "some of these files"
            render.say(f"warning: {name} still has {files}.")
        if nodes := loaded_on(taken.loaded_on):
            render.say(f"warning: loaded on {nodes}, which serve it until they switch.")
        show_sets(taken.sets, f"{'would lose' if dry_run else 'has lost'} a member")

    render.document(taken, json, show)


@root.command()
def deprecate(
    ref: Ref,
    reason: WhyDeprecated = None,
    successor: Annotated[
        str | None, typer.Option(metavar="REF", help="What to use instead.", autocompletion=complete.references)
    ] = None,
    undo: Undo = False,
    json: JsonFlag = False,
) -> None:
    """Mark a release as deprecated, and warn wherever it is resolved; nothing is blocked."""
    body = deprecation_body(ref, reason, successor, undo=undo)
    with connected() as connection:
        path = _exactly(connection, ref, warned=True).path
        release = connection.api.post(f"{path}/deprecate", body, wire.catalog.ReleaseOut)
    render.document(release, json, lambda: show_deprecation(release.name, release.deprecated))


def deprecation_body(what: str, reason: str | None, successor: str | None, *, undo: bool) -> dict[str, str | None]:
    """The request of a deprecation. Raises Usage unless there is a reason, or `undo` alone."""
    if undo is (reason is not None) or (undo and successor):
        raise Usage(
            "reason_missing",
            "A deprecation needs a reason, and undoing one needs nothing else.",
            subject=what,
            next_step="State a reason with --reason, or give --undo alone.",
        )
    return {"reason": reason, "successor": successor}


def show_deprecation(name: str, deprecated: "wire.catalog.DeprecationOut | None") -> None:
    words = deprecation_words(deprecated)
    render.out(f"{name} is deprecated: {words}" if words else f"{name} is not deprecated")


def _exactly(connection: Connection, ref: str, *, warned: bool = False) -> "wire.search.ResolvedRelease":
    """The release that an exact reference names. Raises Usage for a moving one: repeating the command would hit the
    next release."""
    named = parse_reference(ref)
    if named.version is None and named.commit is None:
        raise Usage(
            "not_exact",
            f"{ref} can mean a different release tomorrow.",
            subject=ref,
            next_step=f"Name the version: {named.repository}:1.2.0, or #COMMIT.",
        )
    return resolved(connection, ref, warned=warned)
