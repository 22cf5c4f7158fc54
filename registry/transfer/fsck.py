"""Integrity checks: `check` reads everything, changes nothing, and reports what is broken.

Every file of every revision is complete in the store; a commit is the hash of its manifest; a channel is where its last
move put it and its moves form a chain; every release, every move and every commit to `main` has its audit row, and
no sealed audit row was changed or deleted.
"""

import hashlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from itertools import islice
from typing import TypeVar

from sqlalchemy import Select, exists, func, select, text
from sqlalchemy.orm import Session, selectinload

from composer.findings import Finding, Severity
from registry.database.locks import lock_blobs_exclusive
from registry.database.tables import (
    AuditRow,
    Blob,
    BlobHolder,
    Channel,
    Commit,
    Move,
    Namespace,
    Release,
    Repository,
    Revision,
    RevisionFile,
    Score,
    Upload,
)
from registry.domain.access import audit, audit_chain
from registry.domain.access.audit import Act
from registry.domain.catalog.releases import full_name
from registry.domain.catalog.repositories import Kind
from registry.domain.channels.serving import ACTS, CHANGES, DELETION, due_move
from registry.errors import RegistryError
from registry.formats.manifest import ManifestFile, canonical_manifest, commit_id
from registry.formats.references import ABSENT, RESERVED_NAMESPACES, Digest, parse_version
from registry.storage.blobs import BlobStat
from registry.transfer.resources import Resources

Progress = Callable[[int], None]
T = TypeVar("T")
UNSEALED = timedelta(hours=1)
"""How long an audit row may wait for a worker to seal it."""
_BATCH = 500
_BLOCK_BYTES = 1 << 20
_PARALLEL = 8
_NAMED = 5
"""Up to this many releases affected by a damaged blob are named; further ones are counted."""


@dataclass(frozen=True, slots=True)
class Extent:
    """The extent of a check: the number of rows, and the bytes that the store should have."""

    releases: int
    revisions: int
    channels: int
    blobs: int
    size_bytes: int

    @property
    def steps(self) -> int:
        """The total of `check`'s progress."""
        return self.releases + self.revisions + self.channels + self.blobs

    @property
    def contents(self) -> list[str]:
        """`2 releases`, `1 channel`, `9 blobs`."""
        counts = {"release": self.releases, "channel": self.channels, "blob": self.blobs}
        return [f"{count:,} {what}{'s' * (count != 1)}" for what, count in counts.items()]

    def to_json(self) -> dict[str, int]:
        return asdict(self)


def check(resources: Resources, *, read_bytes: bool = False, progress: Progress = lambda _count: None) -> list[Finding]:
    """Runs all checks. Errors are violations; notices are leftovers that a collection will remove.

    `read_bytes` hashes every blob instead of checking only its size. `progress` counts what was checked. Raises
    Unavailable if the whole store is unavailable, instead of one finding per blob.
    """
    with resources.database.snapshot() as session:
        findings = [*_check_database(session)]
        for step in (_check_revisions, _check_channels, _check_releases):
            findings += step(session, progress)
        findings += [*_check_commits(session), *_check_names(session), *_find_leaving(session)]
        findings += [*audit_chain.check(session), *_find_unsealed(session, resources.clock())]
    resources.store.stat(ABSENT)
    findings += _check_blobs(resources, read_bytes=read_bytes, progress=progress)
    findings += _find_orphans(resources)
    return findings


def discard(resources: Resources, findings: Iterable[Finding]) -> Iterator[Digest]:
    """Deletes the blobs that `check` found damaged, and yields each once it is gone.

    The next push that names a deleted blob sends its bytes; it would not while the store has a blob of that size.
    Each is hashed once more first, since it may have been restored meanwhile. A blob with the right bytes is never
    deleted.
    """
    damaged = {Digest(finding.subject) for finding in findings if finding.code == "blob_corrupt"}
    for sha256 in sorted(damaged):
        stat = resources.store.stat(sha256)
        if stat is None or _digest(resources, sha256) == sha256:
            continue
        with _as_it_was(resources, stat) as session:
            if session is None:
                continue
            operator = audit.operator_actor(resources.settings.user, resources.clock())
            gone = {"size_bytes": stat.size_bytes}
            audit.record(session, operator, Act.BLOB_DISCARD, sha256, namespace=None, reason="damaged", before=gone)
        # In a transaction of its own: a later failure leaves an extra row, never a deletion without a row.
        with _as_it_was(resources, stat) as session:
            if session is None:
                continue
            resources.store.delete(sha256)
        yield sha256


@contextmanager
def _as_it_was(resources: Resources, stat: BlobStat) -> Generator[Session | None]:
    """A transaction that blocks new uses of the blob; None if it was rewritten meanwhile."""
    with resources.write() as session:
        lock_blobs_exclusive(session)
        yield session if resources.store.stat(stat.sha256) == stat else None


def extent(resources: Resources) -> Extent:
    """Counts what a check covers: releases, revisions, channels and blobs."""
    with resources.read() as session:
        counts = {
            name: session.scalar(select(func.count()).select_from(table)) or 0
            for name, table in (("releases", Release), ("revisions", Revision), ("channels", Channel))
        }
        blobs, size_bytes = session.execute(select(func.count(), func.coalesce(func.sum(Blob.size_bytes), 0))).one()
    return Extent(**counts, blobs=blobs, size_bytes=int(size_bytes))  # a sum is a Decimal in PostgreSQL


def _check_database(session: Session) -> Iterator[Finding]:
    if session.get_bind().dialect.name != "sqlite":  # PostgreSQL checks its constraints and its pages itself
        return
    for row in session.execute(text("PRAGMA foreign_key_check")).all():
        yield _error("dangling", str(row[0]), f"Row {row[1]} of {row[0]} refers to a missing row of {row[2]}.")
    for (outcome,) in session.execute(text("PRAGMA quick_check")).all():
        if outcome != "ok":
            yield _error("database_damaged", "registry.db", str(outcome))


def _check_revisions(session: Session, progress: Progress) -> Iterator[Finding]:
    query = select(Revision).options(selectinload(Revision.files)).order_by(Revision.id)
    names = {row.id: f"{row.namespace}/{row.name}" for row in session.scalars(select(Repository))}
    for revision in _stream(session, query):
        subject = f"{names[revision.repository_id]}#{revision.commit[:12]}"
        files = [ManifestFile(file.path, file.size_bytes, Digest(file.sha256)) for file in revision.files]
        manifest = revision.manifest.encode()
        is_intact = not files if revision.taken_down_at is not None else _is_manifest(manifest, files)
        if not is_intact or commit_id(manifest) != revision.commit:
            yield _error("commit_differs", subject, f"The manifest of {subject} does not match its commit.")
        progress(1)
    leaving = select(RevisionFile.path, Blob.sha256).join(Blob, Blob.sha256 == RevisionFile.sha256)
    for path, sha256 in session.execute(leaving.where(Blob.removing_at.is_not(None))):
        yield _error("blob_leaving", path, f"{path} ({sha256[:12]}) is being removed although it is in use.")
    unheld = (
        select(Repository.namespace, RevisionFile.path, RevisionFile.sha256)
        .join(Revision, Revision.id == RevisionFile.revision_id)
        .join(Repository, Repository.id == Revision.repository_id)
        .outerjoin(
            BlobHolder, (BlobHolder.sha256 == RevisionFile.sha256) & (BlobHolder.namespace == Repository.namespace)
        )
        .where(BlobHolder.sha256.is_(None))
    )
    for namespace, path, sha256 in session.execute(unheld):
        yield _error("blob_not_held", path, f"{namespace} names {path} ({sha256[:12]}) without holding its bytes.")


def _is_manifest(manifest: bytes, files: Sequence[ManifestFile]) -> bool:
    try:
        return canonical_manifest(files) == manifest
    except RegistryError:  # no client could pull such files
        return False


def _check_commits(session: Session) -> Iterator[Finding]:
    recorded = {
        (row.subject, (row.after or {}).get("commit"))
        for row in _stream(session, select(AuditRow).where(AuditRow.act == Act.REPOSITORY_COMMIT))
    }
    names = {row.id: f"{row.namespace}/{row.name}" for row in session.scalars(select(Repository))}
    for commit in _stream(session, select(Commit).order_by(Commit.id)):
        name, made = names[commit.repository_id], commit.revision.commit
        if commit.revision.repository_id != commit.repository_id:
            yield _error("commit_adrift", name, f"A commit of {name} has the files of another repository.")
        elif (name, made) not in recorded:
            yield _error("audit_differs", name, f"No audit row says who made the commit {made[:12]} of {name}.")
    nameless = select(Revision).where(
        ~exists().where(Release.revision_id == Revision.id), ~exists().where(Commit.revision_id == Revision.id)
    )
    for revision in session.scalars(nameless):
        name = names[revision.repository_id]
        yield _error("revision_unused", name, f"Nothing in {name} names its files {revision.commit[:12]}.")


def _check_names(session: Session) -> Iterator[Finding]:
    """Reports names that are refused today."""
    for name in session.scalars(select(Namespace.name).where(Namespace.name.in_(RESERVED_NAMESPACES))):
        message = f"The server has addresses of its own below /{name}: clients of the hub may not see this namespace."
        yield Finding("namespace_reserved", Severity.NOTICE, name, message)
    for row in session.scalars(select(Repository).where(Repository.name.endswith(".git"))):
        name = f"{row.namespace}/{row.name}"
        yield Finding("name_reserved", Severity.NOTICE, name, f"Clients of the Hugging Face Hub cannot name {name}.")


def _check_channels(session: Session, progress: Progress) -> Iterator[Finding]:
    for channel, repository in session.execute(
        select(Channel, Repository).join(Repository, Repository.id == Channel.repository_id).order_by(Channel.id)
    ).all():
        subject = f"{repository.namespace}/{repository.name}@{channel.name}"
        query = select(Move).where(Move.channel_id == channel.id).order_by(Move.id)
        moves = session.scalars(query.options(selectinload(Move.to_release))).all()
        yield from _check_moves(subject, channel, moves)
        yield from _check_served(session, subject, channel)
        yield from _check_audit(session, subject, {move.id for move in moves})
        progress(1)


def _check_moves(subject: str, channel: Channel, moves: Sequence[Move]) -> Iterator[Finding]:
    """The moves are one chain: each starts where the one before it ended."""
    moves = [move for move in moves if move.kind not in CHANGES]
    last = moves[-1] if moves and moves[-1].kind != DELETION else None
    if (last.id if last else None) != channel.move_id:
        yield _error("channel_adrift", subject, f"{subject} is not where its last move put it.")
    served, seen = None, set[int]()
    for move in moves:
        if move.from_release_id != served:
            yield _error("history_broken", subject, f"Move {move.id} of {subject} does not follow the one before it.")
        if move.below_id is not None and move.below_id not in seen:
            yield _error(
                "history_broken", subject, f"Move {move.id} of {subject} returns to a move that is not its own."
            )
        if move.to_release.repository_id != channel.repository_id:
            yield _error("history_broken", subject, f"Move {move.id} of {subject} serves another repository's release.")
        served = None if move.kind == DELETION else move.to_release_id
        seen.add(move.id)


def _check_served(session: Session, subject: str, channel: Channel) -> Iterator[Finding]:
    """Checks that the channel serves the release that it should."""
    of_sets = session.get_one(Repository, channel.repository_id).kind == Kind.SET  # others may withdraw members
    move = due_move(session, channel, again=not of_sets)
    served = (move.to_release_id, move.to_release.sort_key) if move else (None, None)
    if (channel.served_id, channel.served_key) != served:
        yield _error("channel_adrift", subject, f"Search does not find the release that {subject} serves.")


def _check_audit(session: Session, subject: str, moves: set[int]) -> Iterator[Finding]:
    acts = (Act.CHANNEL_PROMOTE, Act.CHANNEL_ROLLBACK, *ACTS.values())
    rows = session.scalars(select(AuditRow).where(AuditRow.subject == subject, AuditRow.act.in_(acts))).all()
    recorded = [(row.after or row.detail).get("move") for row in rows]  # before schema 0002 it was a detail
    if sorted(move for move in recorded if move is not None) != sorted(moves):
        yield _error("audit_differs", subject, f"The audit rows of {subject} do not match its moves.")


def _check_releases(session: Session, progress: Progress) -> Iterator[Finding]:
    published = set(session.scalars(select(AuditRow.subject).where(AuditRow.act == Act.RELEASE_PUBLISH)))
    for release in _stream(session, select(Release).order_by(Release.id)):
        name = full_name(release)
        if name not in published:
            yield _error("audit_differs", name, f"No audit row says who published {name}.")
        if release.rank_max != release.facts.get("rank_max") or release.type != release.facts.get("type"):
            yield _error("facts_differ", name, f"The columns of {name} do not match its facts.")
        if not _is_version(release.version):
            yield _error("version_unreadable", name, f"{name} cannot be requested or bumped: its version is invalid.")
        progress(1)


def _is_version(text: str) -> bool:
    try:
        return str(parse_version(text)) == text
    except RegistryError:
        return False


def _check_blobs(resources: Resources, *, read_bytes: bool, progress: Progress) -> Iterator[Finding]:
    """Queries the store for one batch at a time, outside any transaction."""

    def look(blob: Blob) -> Finding | None:
        finding = _look(resources, blob, read_bytes=read_bytes)
        progress(1)
        return finding

    after = ""
    with ThreadPoolExecutor(_PARALLEL, "fsck") as pool:
        while True:
            with resources.read() as session:
                query = select(Blob).where(Blob.sha256 > after, Blob.removing_at.is_(None)).order_by(Blob.sha256)
                batch = list(session.scalars(query.limit(_BATCH)))
            if not batch:
                return
            after = batch[-1].sha256
            for finding in pool.map(look, batch):
                if finding is not None:
                    yield _with_names(resources, finding)


def _look(resources: Resources, blob: Blob, *, read_bytes: bool) -> Finding | None:
    sha256 = Digest(blob.sha256)
    try:
        stat = resources.store.stat(sha256)
        if stat is None:
            return _error("blob_missing", sha256, f"The store has no blob {sha256}.")
        if stat.size_bytes != blob.size_bytes:
            return _error("blob_corrupt", sha256, f"The blob {sha256} has {stat.size_bytes:,} bytes in the store.")
        # One wrong read may be the network's or the memory's fault.
        if read_bytes and all(_digest(resources, sha256) != sha256 for _ in range(2)):
            return _error("blob_corrupt", sha256, f"The bytes of the blob {sha256} are damaged.")
    except RegistryError as error:
        return _error("blob_unreadable", sha256, f"The blob {sha256} cannot be read: {error.detail}")
    except OSError as error:
        return _error("blob_unreadable", sha256, f"The blob {sha256} cannot be read: {error.strerror}.")
    return None


def _digest(resources: Resources, sha256: Digest) -> str:
    digest = hashlib.sha256()
    with resources.store.open(sha256) as source:
        while block := source.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _with_names(resources: Resources, finding: Finding) -> Finding:
    """Names the affected files and releases: a digest alone does not tell an operator what to restore."""
    query = (
        select(Repository.namespace, Repository.name, Release.version, RevisionFile.path)
        .join(Release, Release.repository_id == Repository.id)
        .join(RevisionFile, RevisionFile.revision_id == Release.revision_id)
        .where(RevisionFile.sha256 == finding.subject)
    )
    committed = (
        select(Repository.namespace, Repository.name, Revision.commit, RevisionFile.path)
        .join(Revision, Revision.repository_id == Repository.id)
        .join(RevisionFile, RevisionFile.revision_id == Revision.id)
        .where(RevisionFile.sha256 == finding.subject, ~exists().where(Release.revision_id == Revision.id))
    )
    with resources.read() as session:
        rows = session.execute(query.order_by(Release.id).limit(_NAMED)).all()
        commits = session.execute(committed.order_by(Revision.id.desc()).limit(_NAMED - len(rows))).all()
        total = sum(
            session.scalar(select(func.count()).select_from(counted.subquery())) or 0 for counted in (query, committed)
        )
        scored = select(func.count()).select_from(Score).where(Score.results_sha256 == finding.subject)
        scores = session.scalar(scored) or 0
    named = [f"{path} of {namespace}/{name}:{version}" for namespace, name, version, path in rows]
    named += [f"{path} of {namespace}/{name}#{commit[:12]}" for namespace, name, commit, path in commits]
    if total > len(named):
        named.append(f"{total - len(named):,} more")
    if scores:
        named.append(f"the results behind {scores} score{'s' * (scores > 1)}")
    if not named:
        return Finding(finding.code, Severity.NOTICE, finding.subject, f"{finding.message} No release uses it.")
    return Finding(finding.code, finding.severity, finding.subject, f"{finding.message} It is {'; '.join(named)}.")


def _find_unsealed(session: Session, now: datetime) -> Iterator[Finding]:
    """Audit rows that no process has sealed: without a worker, nothing does."""
    if waiting := audit_chain.count_unsealed(session, now - UNSEALED):
        message = f"{waiting:,} audit rows are not sealed. A worker seals them, and `adaptory audit checkpoint`."
        yield Finding("audit_unsealed", Severity.NOTICE, "audit", message)


def _find_leaving(session: Session) -> Iterator[Finding]:
    leaving = select(func.count(), func.min(Blob.removing_at)).where(Blob.removing_at.is_not(None))
    count, since = session.execute(leaving).one()
    if count:
        message = f"{count:,} blobs are being removed, since {since:%Y-%m-%d %H:%M} UTC; `adaptory gc` finishes that."
        yield Finding("leaving", Severity.NOTICE, "store", message)


def _find_orphans(resources: Resources) -> Iterator[Finding]:
    """The unused blobs. Announced ones are left out, as in a collection: a release may still name them."""
    stats = resources.store.iterate()
    orphans = size_bytes = announced = 0
    until = resources.clock()
    while batch := list(islice(stats, _BATCH)):
        digests = [stat.sha256 for stat in batch]
        with resources.read() as session:
            known = set(session.scalars(select(Blob.sha256).where(Blob.sha256.in_(digests))))
            still = select(Upload).where(Upload.sha256.in_(digests), Upload.expires_at >= resources.clock())
            waits = {row.sha256: row.expires_at for row in session.scalars(still.order_by(Upload.expires_at))}
        unknown = [stat for stat in batch if stat.sha256 not in known]
        orphans, size_bytes = orphans + len(unknown), size_bytes + sum(stat.size_bytes for stat in unknown)
        waited_for = [waits[stat.sha256] for stat in unknown if stat.sha256 in waits]
        announced, until = announced + len(waited_for), max([until, *waited_for])
    if orphans:
        message = (
            f"{orphans:,} blobs ({size_bytes:,} bytes) in the store belong to no release; `adaptory gc` removes them "
            "when they are older than its --grace-hours"
        )
        if announced:
            message += f", and the {announced:,} that uploads have announced not before {until:%Y-%m-%d %H:%M} UTC"
        yield Finding("orphans", Severity.NOTICE, "store", f"{message}.")


def _stream(session: Session, query: Select[T]) -> Iterable[T]:
    return session.scalars(query.execution_options(yield_per=_BATCH))


def _error(code: str, subject: str, message: str) -> Finding:
    return Finding(code, Severity.ERROR, subject, message)
