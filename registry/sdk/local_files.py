"""Files of releases and bases on this machine: verified copies, and those that become a release."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from registry.errors import NotFound
from registry.formats.references import parse_reference
from registry.sdk.connection import Connection
from registry.sdk.display import Display

if TYPE_CHECKING:
    from composer.formats.checkpoints.checkpoint import Checkpoint
    from registry.client.api import Api
    from registry.client.selection import Selection
    from registry.client.signing import Publication
    from registry.wire.catalog import BaseOut, PublishedOut
    from registry.wire.search import AnyRelease, ResolvedRelease


def resolved(connection: Connection, ref: str, warn: Callable[[str], None]) -> "ResolvedRelease":
    """The release that `ref` names. Warns of a yanked or deprecated one."""
    resolution = connection.api.resolve(parse_reference(ref))
    if resolution.warning:
        warn(resolution.warning)
    return resolution.release


def release_directory(connection: Connection, release: "AnyRelease", display: Display) -> Path:
    """The directory of the release's files on this machine, just verified."""
    from registry.client.pull import cached

    with display.progress(f"pull {release.name}", total_bytes(release)) as done:
        return cached(connection.api, release, connection.cache, done)


def total_bytes(release: "AnyRelease") -> int:
    """Total size of a release's files."""
    return sum(file.size_bytes for file in release.files)


def base_checkpoint(base: "BaseOut", override: Path | None, display: Display) -> "Checkpoint":
    """The base's weights on this machine, verified by hash: a path does not prove what was measured. Downloads
    them from a hub or a bucket if they are not here. Raises NotFound if no location gives them, Mismatch for other
    weights."""
    from composer.formats.checkpoints.checkpoint import open_checkpoint
    from composer.formats.checkpoints.hashing import verify_checkpoint
    from registry.sdk.connection import load_settings
    from registry.transfer.bases import Bases

    directory, reasons = override, list[str]()
    if directory is None:
        with display.progress(f"find {base.name}", None):
            # In use until this process ends: it may load the base at any time.
            directory, reasons = Bases(load_settings()).find(base.locations, base.size_bytes)
    if directory is None:
        raise NotFound(
            "base_not_here",
            " ".join([f"No location of {base.name} is on this machine.", *reasons]),
            subject=base.name,
            next_step="Name its directory with --base-dir, or run `adaptory base add DIR` here.",
        )
    checkpoint = open_checkpoint(directory)
    total = sum(header.size_bytes for header in checkpoint.shards.values())
    with display.progress(f"verify {base.name}", total) as done:
        verify_checkpoint(checkpoint, base.digest, done)
    return checkpoint


def publish(
    api: "Api", selection: "Selection", publication: "Publication", display: Display, key: Path | None = None
) -> "tuple[PublishedOut, int]":
    """Hashes the files, sends them, and publishes the release, signed with the private key if there is one. Returns the
    registry's answer, and the number of files that the store lacked."""
    from registry.client.push import collect, push
    from registry.client.signing import push_signed

    version = publication.request["version"]
    label = f"push {publication.target}" + (f":{version}" if version else "")
    with TemporaryDirectory() as staging:
        with display.progress("hash", selection.size_bytes) as done:
            files = collect(selection, done)
        with display.progress(label, sum(file.manifest.size_bytes for file in files)) as done:
            if key:
                return push_signed(api, files, publication, key, Path(staging), done)
            return push(api, files, publication.target, publication.kind, publication.request, done)
