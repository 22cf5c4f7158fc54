"""Backups: the rows of one moment, then the blobs that they name, into an archive; and back into an empty registry.

A blob is in the store before a row names it and never changes, so blobs that are copied after the rows include all
that these name. No collection runs meanwhile. The manifest comes last: a backup without one does not exist. On the
way back the rows come last.
"""

import gzip
import hashlib
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory
from typing import IO, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from sqlalchemy import false, select
from sqlalchemy.orm import Session

from registry.database import portable
from registry.database.engine import Database
from registry.database.locks import exclusive_collection
from registry.database.migrate import head_revision, migrate, schema_revision
from registry.database.tables import (
    Blob,
    FleetChannel,
    FleetDrift,
    FleetNode,
    FleetRelease,
    StoreFactsRow,
    Token,
    Upload,
    WebhookSecret,
    WorkerRow,
    XetUpload,
    XetXorb,
)
from registry.errors import Conflict, Invalid, NotFound, Unavailable
from registry.formats.references import Digest
from registry.storage.archive import Archive
from registry.storage.blobs import BlobStore, Reader
from registry.transfer.resources import Resources

_OF_NODES = (WorkerRow, FleetNode, FleetChannel, FleetRelease, FleetDrift)
UNSAVED = (Upload, XetUpload, XetXorb, StoreFactsRow, WebhookSecret, *_OF_NODES)
"""Tables that mean nothing to another registry: unfinished uploads in the old store, the facts about that store, and
the running workers and nodes. Secrets are left out too."""
_ONLY = {Token.__tablename__: Token.session == false()}
"""Browser sessions are not restored."""
_ROWS, _BLOBS, _MANIFEST = "rows.jsonl.gz", "blobs.txt.gz", "manifest.json"
_FORMAT = 1
_MAX_MANIFEST_BYTES = 1 << 24
_BLOCK_BYTES = 1 << 20
_BATCH = 500
_PARALLEL = 8
_STALE = timedelta(days=1)


class BytesProgress(Protocol):
    """Called with bytes that are done; `expect` sets their total."""

    def __call__(self, count: int) -> None: ...
    def expect(self, total: int) -> None: ...


class BackupDocument(BaseModel):
    """A file of a backup, by its digest."""

    model_config = ConfigDict(frozen=True)
    sha256: str
    size_bytes: int


class Manifest(BaseModel):
    """A complete backup. `missing` are blobs that the registry itself lacked, or that were damaged there."""

    model_config = ConfigDict(frozen=True)
    format: int = Field(ge=1)
    name: str
    created_at: datetime
    adaptory: str
    schema_revision: str = Field(pattern=r"^[0-9]{4}$")
    tables: dict[str, int]
    rows: BackupDocument
    blobs: BackupDocument
    blob_count: int
    blob_bytes: int
    missing: dict[str, str]


@dataclass(frozen=True, slots=True)
class Saved:
    """A finished backup: the blobs copied for it, and the number of earlier backups removed."""

    manifest: Manifest
    copied: int
    copied_bytes: int
    removed: int


@dataclass(frozen=True, slots=True)
class Restored:
    """The result of a restore: rows by table, and the copied blobs; `kept` counts those that the store had already,
    from an interrupted restore or because it is the old store."""

    manifest: Manifest
    tables: dict[str, int]
    copied: int
    copied_bytes: int
    kept: int


def back_up(
    resources: Resources, archive: Archive, *, keep: int | None, read_bytes: bool, progress: BytesProgress
) -> Saved:
    """Adds a backup to the archive, which then keeps the newest `keep`. `read_bytes` hashes the blobs that the archive
    already has, instead of comparing only their sizes.

    An interrupted backup is continued: its blobs stay. Raises Conflict while a collection or another backup runs.
    """
    with exclusive_collection(resources.database):
        archive.blobs.sweep(resources.clock() - _STALE, ())
        with TemporaryDirectory(prefix="backup-", dir=archive.scratch) as scratch:
            work, now = Path(scratch), resources.clock()
            counts = _write_rows(resources, work)
            copied = _Copy(resources.store, archive.blobs, work, read_bytes=read_bytes)
            size = sum(size for _, size in _listed(work / _BLOBS))
            progress.expect(size)
            for done in copied.run(_listed(work / _BLOBS)):
                progress(done)
            manifest = Manifest(
                format=_FORMAT,
                name=f"{now:%Y%m%dT%H%M%S.%fZ}",
                created_at=now,
                adaptory=version("adaptory"),
                schema_revision=head_revision(),
                tables=counts,
                rows=_document(work / _ROWS),
                blobs=_document(work / _BLOBS),
                blob_count=copied.seen,
                blob_bytes=size,
                missing=copied.missing,
            )
            (work / _MANIFEST).write_text(manifest.model_dump_json(indent=2))
            for name in (_ROWS, _BLOBS, _MANIFEST):
                archive.save(f"{manifest.name}/{name}", work / name)
        removed = 0 if keep is None else _remove_old(archive, keep)
    return Saved(manifest, copied.count, copied.size_bytes, removed)


def _write_rows(resources: Resources, work: Path) -> dict[str, int]:
    """Writes the rows, and the list of the blobs that are not being removed, as of one moment."""
    counts: dict[str, int] = {}
    table = ""
    with resources.snapshot() as session:
        with gzip.open(work / _ROWS, "wb", compresslevel=3) as rows:
            for line in portable.dump(session, portable.tables(UNSAVED), _ONLY):
                rows.write(line)
                if line.startswith(b"{"):
                    table = line.split(b'"', 4)[3].decode()
                    counts[table] = 0
                else:
                    counts[table] += 1
        query = select(Blob.sha256, Blob.size_bytes).where(Blob.removing_at.is_(None)).order_by(Blob.sha256)
        with gzip.open(work / _BLOBS, "wt", compresslevel=3) as blobs:
            for sha256, size in session.execute(query, execution_options={"yield_per": _BATCH}):
                blobs.write(f"{sha256} {size}\n")
    return counts


def _listed(path: Path) -> Iterator[tuple[Digest, int]]:
    with gzip.open(path, "rt") as lines:
        for line in lines:
            sha256, size = line.split()
            yield Digest(sha256), int(size)


class _Copy:
    """Copies blobs from one store to another, each hashed on the way. Blobs that the target has are not copied; with
    `read_bytes` they are hashed, and copied again if they are damaged."""

    def __init__(self, source: BlobStore, target: BlobStore, scratch: Path, *, read_bytes: bool) -> None:
        self._source, self._target, self._scratch, self._read = source, target, scratch, read_bytes
        self._present = {bytes.fromhex(stat.sha256): stat.size_bytes for stat in target.iterate()}
        self.seen = self.count = self.size_bytes = 0
        self.missing: dict[str, str] = {}

    def run(self, blobs: Iterable[tuple[Digest, int]]) -> Iterator[int]:
        """Yields the size of each blob that is done."""
        left = iter(blobs)
        with ThreadPoolExecutor(_PARALLEL, "copy") as pool:
            while batch := list(islice(left, _BATCH)):
                for (sha256, size), (copied, trouble) in zip(batch, pool.map(self._bring, batch), strict=True):
                    self.seen += 1
                    self.count += copied
                    self.size_bytes += size * copied
                    if trouble:
                        self.missing[sha256] = trouble
                    yield size

    def _bring(self, blob: tuple[Digest, int]) -> tuple[bool, str]:
        """Copies the blob; returns whether it was copied, and otherwise the reason."""
        sha256, size = blob
        complete = self._present.get(bytes.fromhex(sha256)) == size
        if complete and not (self._read and _trouble(self._target, sha256, None)):
            return False, ""
        if bytes.fromhex(sha256) in self._present:
            self._target.delete(sha256)  # a store does not replace a blob of the right size
        with NamedTemporaryFile(dir=self._scratch, delete=False) as file:
            path = Path(file.name)
            trouble = _trouble(self._source, sha256, file)
        if not trouble:
            self._target.put(sha256, path, move=True)
        path.unlink(missing_ok=True)
        return not trouble, trouble


def _trouble(store: BlobStore, sha256: Digest, copy: IO[bytes] | None) -> str:
    """Reads a blob, into `copy` if given, and returns a description of its damage; empty if it is intact. Reads a
    damaged blob again: one wrong read may be the network's or the memory's fault."""
    for _ in range(2):
        digest = hashlib.sha256()
        if copy is not None:
            copy.seek(0)
            copy.truncate()
        try:
            with store.open(sha256) as reader:
                for block in _blocks(reader):
                    digest.update(block)
                    if copy is not None:
                        copy.write(block)
        except NotFound:
            return "missing"
        except _Unreadable as error:
            return str(error)
        if digest.hexdigest() == sha256:
            return ""
    return "damaged"


class _Unreadable(Exception):
    """The disk failed to read a blob's bytes."""


def _blocks(reader: Reader) -> Iterator[bytes]:
    while True:
        try:
            block = reader.read(_BLOCK_BYTES)
        except OSError as error:
            raise _Unreadable(f"unreadable: {error.strerror}") from error
        if not block:
            return
        yield block


def _document(path: Path) -> BackupDocument:
    with path.open("rb") as file:
        return BackupDocument(sha256=hashlib.file_digest(file, "sha256").hexdigest(), size_bytes=path.stat().st_size)


def complete(archive: Archive) -> list[str]:
    """The names of the complete backups, oldest first."""
    return sorted(name.split("/")[0] for name in archive.names() if name.endswith(f"/{_MANIFEST}"))


def _remove_old(archive: Archive, keep: int) -> int:
    """Removes all but the newest backups, then the blobs that only the removed ones named. Returns their number."""
    kept = complete(archive)[-keep:]
    gone = {name.split("/")[0] for name in archive.names()} - set(kept)
    for name in sorted(gone):
        for document in (_MANIFEST, _BLOBS, _ROWS):  # without its manifest it does not exist
            archive.delete(f"{name}/{document}")
    named: set[bytes] = set()
    with TemporaryDirectory(prefix="backup-", dir=archive.scratch) as scratch:
        for name in kept:
            path = _fetched(archive, name, _BLOBS, read_manifest(archive, name).blobs, Path(scratch))
            named.update(bytes.fromhex(sha256) for sha256, _ in _listed(path))
    for stat in archive.blobs.iterate():
        if bytes.fromhex(stat.sha256) not in named:
            archive.blobs.delete(stat.sha256)
    return len(gone)


def read_manifest(archive: Archive, name: str | None) -> Manifest:
    """The manifest of that backup, or of the newest. Raises NotFound and Invalid."""
    known = complete(archive)
    if not known or name not in (None, *known):
        raise NotFound(
            "backup_missing",
            f"{f'Backup {name} does not exist, or is incomplete' if name else 'The archive has no complete backup'}.",
            subject=name or "",
            next_step=f"Name one of {', '.join(known[-5:])}." if known else "Name the target of `adaptory backup`.",
        )
    chosen = name or known[-1]
    with archive.open(f"{chosen}/{_MANIFEST}") as reader:
        text = reader.read(_MAX_MANIFEST_BYTES)
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        raise damaged(f"{chosen}/{_MANIFEST}", f"it is not a manifest ({error.error_count()} errors)") from error
    if manifest.name != chosen:  # it becomes part of paths
        raise damaged(f"{chosen}/{_MANIFEST}", f"it belongs to the backup {manifest.name[:80]!r}")
    if manifest.format > _FORMAT or manifest.schema_revision > head_revision():
        raise Unavailable(
            "schema_new",
            f"The backup {chosen} was made by Adaptory {manifest.adaptory}, with schema {manifest.schema_revision}.",
            subject=chosen,
            next_step="Install that version, or a newer one.",
        )
    return manifest


def damaged(name: str, why: str) -> Invalid:
    """The error for a document of a backup that differs from what was written."""
    return Invalid("backup_damaged", f"{name} of the backup is damaged: {why}.", subject=name)


def _fetched(archive: Archive, name: str, document: str, expected: BackupDocument, work: Path) -> Path:
    """The document, copied to this machine and checked by its digest."""
    path = work / f"{name}-{document}"
    with archive.open(f"{name}/{document}") as reader, path.open("wb") as file:
        for block in _blocks(reader):
            file.write(block)
    if _document(path) != expected:
        raise damaged(f"{name}/{document}", "its digest is not the one in the manifest")
    return path


def restore(
    database: Database,
    store: BlobStore,
    archive: Archive,
    manifest: Manifest,
    *,
    with_tokens: bool = True,
    progress: BytesProgress,
) -> Restored:
    """Puts a backup into an empty registry: its blobs first, then all rows in one transaction, then this version's
    schema. Blobs that the store has already are hashed. May be repeated after an interruption.

    Raises Conflict for a registry with rows, before anything is changed; its
    code says whether they are those of the backup, so that an earlier restore was complete.
    """
    left_out = frozenset[str]() if with_tokens else frozenset({Token.__tablename__})
    _ensure_empty(database, manifest, left_out)
    with exclusive_collection(database), TemporaryDirectory(prefix="backup-", dir=archive.scratch) as scratch:
        work = Path(scratch)
        rows = _fetched(archive, manifest.name, _ROWS, manifest.rows, work)
        blobs = _fetched(archive, manifest.name, _BLOBS, manifest.blobs, work)
        migrate(database, manifest.schema_revision)
        progress.expect(manifest.blob_bytes)
        copied = _Copy(archive.blobs, store, work, read_bytes=True)
        for done in copied.run(_listed(blobs)):
            progress(done)
        with database.write() as session:
            portable.lock_tables(session)
            _refuse_filled(session, manifest, left_out)
            with gzip.open(rows, "rb") as lines:
                counts = portable.load(session, lines, left_out)
            if any(counts.get(name, 0) != count for name, count in manifest.tables.items() if name not in left_out):
                raise damaged(f"{manifest.name}/{_ROWS}", "its numbers of rows are not those of the manifest")
        migrate(database)
    kept = copied.seen - copied.count - len(copied.missing)
    return Restored(manifest, counts, copied.count, copied.size_bytes, kept)


def _ensure_empty(database: Database, manifest: Manifest, left_out: Collection[str]) -> None:
    revision = schema_revision(database)
    if revision is None:
        return
    with database.read() as session:
        _refuse_filled(session, manifest, left_out)
    if revision > manifest.schema_revision:
        raise Conflict(
            "registry_not_empty",
            f"The database already has tables of schema {revision}, and the backup has schema "
            f"{manifest.schema_revision}.",
            next_step="Restore into a database without tables: they are created and migrated.",
        )


def _refuse_filled(session: Session, manifest: Manifest, left_out: Collection[str]) -> None:
    """Raises Conflict unless the tables are empty. Numbers of rows tell whether the backup was restored completely: all
    come back in one transaction, and every change adds one to the audit log."""
    filled = portable.first_filled(session, [StoreFactsRow])
    if filled is None:
        return
    counts, expected = portable.counts(session), {k: n for k, n in manifest.tables.items() if k not in left_out}
    table = next((name for name, count in expected.items() if counts.get(name, 0) != count), None)
    if table is None:
        raise Conflict(
            "already_restored",
            f"The registry has the {sum(expected.values()):,} rows of the backup {manifest.name} already, and no "
            "later ones: if this backup was restored, that was complete.",
            subject=manifest.name,
        )
    raise Conflict(
        "registry_not_empty",
        f"The registry is not empty: its table {filled} has rows. It is not the restored backup {manifest.name}, or "
        f"was changed since: {table} has {counts.get(table, 0):,} rows there, and {expected[table]:,} in the backup.",
        subject=filled,
    )
