"""Backup and restore. They access the database and the store directly, a backup beside running servers."""

from typing import TYPE_CHECKING, Annotated

import typer

from registry.cli.console import render
from registry.cli.console.connect import own_settings
from registry.cli.console.groups import root
from registry.cli.console.render import JsonFlag
from registry.cli.operations.maintenance import FsckResult, own_resources

if TYPE_CHECKING:
    from registry.transfer.backup import Restored, Saved

_MISSING_SHOWN = 10
Target = Annotated[str, typer.Argument(metavar="DIR|s3://BUCKET/PREFIX", help="The location of the backups.")]
Endpoint = Annotated[
    str | None,
    typer.Option(
        metavar="URL", help="Address of the target's S3 service, if not the registry's; boto3 finds the credentials."
    ),
]


@root.command()
def backup(
    target: Target,
    keep: Annotated[
        int | None, typer.Option(min=1, help="Then remove all but the newest, with blobs that only the others name.")
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Hash the blobs that the target has already, not only new ones.")
    ] = False,
    endpoint_url: Endpoint = None,
    json: JsonFlag = False,
) -> None:
    """Back up all rows of one moment, and the blobs that the target lacks. Safe while others push and pull.

    Exits 1 if the registry lacks a blob, or has it damaged; everything else is in the backup then.
    """
    from registry.transfer.backup import back_up
    from registry.transfer.resources import open_archive

    with own_resources() as resources:
        archive = open_archive(resources.settings, target, endpoint_url)
        with render.progress("backup", None) as progress:
            saved = back_up(resources, archive, keep=keep, read_bytes=full, progress=progress)
    manifest = saved.manifest
    document = {
        "name": manifest.name,
        "schema": manifest.schema_revision,
        "rows": sum(manifest.tables.values()),
        "blobs": manifest.blob_count,
        "size_bytes": manifest.blob_bytes,
        "copied": saved.copied,
        "copied_bytes": saved.copied_bytes,
        "removed": saved.removed,
        "missing": manifest.missing,
    }
    render.document(document, json, lambda: _show_saved(saved))
    if manifest.missing:
        raise typer.Exit(1)


def _show_saved(saved: "Saved") -> None:
    manifest = saved.manifest
    contents = _contents(sum(manifest.tables.values()), manifest.blob_count)
    render.out(
        f"{manifest.name}: {contents} ({render.size(manifest.blob_bytes)}); "
        f"copied {render.counted(saved.copied, 'blob')} ({render.size(saved.copied_bytes)})"
    )
    if saved.removed:
        render.out(f"removed {render.counted(saved.removed, 'older backup')}")
    for sha256, trouble in list(manifest.missing.items())[:_MISSING_SHOWN]:
        render.out(f"error: the registry's blob {sha256} is {trouble}; `adaptory fsck --full` names its releases")
    if len(manifest.missing) > _MISSING_SHOWN:
        render.out(f"error: and {len(manifest.missing) - _MISSING_SHOWN:,} more blobs")


@root.command()
def restore(
    source: Target,
    name: Annotated[str | None, typer.Option(help="Name of the backup; the newest by default.")] = None,
    without_tokens: Annotated[
        bool, typer.Option("--without-tokens", help="Leave tokens out: some may have been revoked since.")
    ] = False,
    endpoint_url: Endpoint = None,
    json: JsonFlag = False,
) -> None:
    """Restore a backup into an empty registry, check it as fsck does, and exit with the code of that check.

    The registry is that of ADAPTORY_DATABASE_URL, ADAPTORY_STORAGE__… and ADAPTORY_HOME; the backup may be of another
    kind of database and store. Stop the servers first. Repeat it if it was interrupted: it continues, or reports that
    it was complete.
    """
    from registry.transfer.backup import read_manifest
    from registry.transfer.backup import restore as put_back
    from registry.transfer.resources import open_archive, open_for_restore

    settings = own_settings()
    with open_for_restore(settings) as (database, store):
        archive = open_archive(settings, source, endpoint_url)
        manifest = read_manifest(archive, name)
        with render.progress("restore", None) as progress:
            restored = put_back(database, store, archive, manifest, with_tokens=not without_tokens, progress=progress)
    with own_resources() as resources:
        check = FsckResult.of(resources, read_bytes=False)  # each blob was hashed on its way
    document = {
        "name": manifest.name,
        "rows": sum(restored.tables.values()),
        "blobs": manifest.blob_count,
        "kept": restored.kept,
        "copied": restored.copied,
        "copied_bytes": restored.copied_bytes,
        "fsck": check.to_json(),
    }
    render.document(document, json, lambda: _show_restored(restored, check))
    if check.broken:
        raise typer.Exit(1)


def _show_restored(restored: "Restored", check: FsckResult) -> None:
    contents = _contents(sum(restored.tables.values()), restored.manifest.blob_count)
    render.out(f"{restored.manifest.name}: {contents}; copied {render.counted(restored.copied, 'blob')}")
    if restored.kept:
        kept = render.counted(restored.kept, "blob")
        render.out(f"the store had {kept} of it: from a restore that was not complete, or from before")
    check.show()


def _contents(rows: int, blobs: int) -> str:
    return f"{render.counted(rows, 'row')} and {render.counted(blobs, 'blob')}"
