"""Garbage collection of old commits, unfinished uploads, unused blobs and bytes without a row. Safe while others push.

A blob is removed in three steps: its row is marked in a transaction that checks again that nothing refers to it; then
its bytes are deleted; then its row, in one transaction with an audit row. A marked blob cannot be used again, so after
a crash the next collection finishes the removal. A takedown marks blobs whatever their age.

Before that, retention takes down yanked releases and pre-releases of namespaces that require it, and removes finished
jobs.
"""

import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from hashlib import sha256
from itertools import islice
from pathlib import Path

from sqlalchemy import ColumnElement, and_, delete, exists, false, func, insert, or_, select, update
from sqlalchemy.orm import Session

from registry.database import idempotency
from registry.database.locks import exclusive_collection, lock_blobs_exclusive
from registry.database.tables import Blob, RevisionFile, Score, Upload, XetUpload, XetXorb
from registry.domain.access import audit
from registry.domain.access.audit import Act
from registry.domain.catalog import commits
from registry.domain.changes import requests
from registry.domain.channels import retention
from registry.domain.compositions import checks
from registry.domain.jobs import queue
from registry.domain.rollouts import fleet
from registry.environment.settings import Settings
from registry.errors import Conflict
from registry.formats.references import Digest
from registry.storage.blobs import BlobStat
from registry.storage.local import remove_stale
from registry.transfer.resources import Resources
from registry.transfer.uploads import ARRIVED

_BATCH = 100
_UPLOADS_BATCH = 1_000
_SCRATCH = ("upload-*", "inspect-*", "signature-*", "backup-*", "stream-*", "evaluation-*", "conflicts-*")
"""Below the work directory. Version 0.1 left the last two."""
_UNTRACKED = {"synchronize_session": False}
_JOURNALS = ("cache", "eval")
"""Below the home directory."""


@dataclass(slots=True)
class Collected:
    """The results of a collection. `unfinished` and `leftovers` are those of `Swept`; a caller may add leftovers of its
    own. `loaded` releases stay only because nodes have them loaded."""

    releases: int = 0
    loaded: int = 0
    jobs: int = 0
    commits: int = 0
    blobs: int = 0
    size_bytes: int = 0
    unfinished: int = 0
    leftovers: int = 0


def collect(resources: Resources, *, grace: timedelta, dry_run: bool = False) -> Collected:
    """Removes what has been unused for `grace`; with `dry_run`, only counts blobs and uploads.

    The grace period is how long a push may take from checking a blob to publishing a release that names it. Commits
    without a release are kept for `commit_retention_days` after another commit has followed them.
    """
    now, run = resources.clock(), uuid.uuid4().hex
    before = now - grace
    ended_before = now - timedelta(days=resources.settings.job_retention_days)
    followed_before = now - timedelta(days=resources.settings.commit_retention_days)
    collected = Collected()
    with resources.read() as session:
        collected.loaded = len(retention.expired(session, now, limit=None, loaded=True))
    if dry_run:
        with resources.read() as session:
            forgotten = commits.forgettable(followed_before)
            jobs = queue.expired(ended_before).subquery()
            collected.jobs = session.scalar(select(func.count()).select_from(jobs)) or 0
            collected.releases = len(retention.expired(session, now, limit=None))
            collected.commits = session.scalar(select(func.count()).select_from(forgotten.subquery())) or 0
            unused = _unused(before, now, RevisionFile.revision_id.in_(forgotten))
            sizes = list(session.scalars(select(Blob.size_bytes).where(*unused)))
            collected.unfinished = (
                session.scalar(select(func.count()).select_from(Upload).where(Upload.expires_at < now, ~ARRIVED)) or 0
            )
        sizes += [stat.size_bytes for batch in _orphans(resources, before, now) for stat in batch]
        collected.blobs, collected.size_bytes = len(sizes), sum(sizes)
        return collected
    with exclusive_collection(resources.database):
        swept = sweep(resources, now)
        collected.unfinished, collected.leftovers = swept.uploads, swept.leftovers
        collected.releases = _take_down_expired(resources, now)
        while count := _forget(resources, queue.forget, ended_before):
            collected.jobs += count
        while count := _forget(resources, commits.forget, followed_before):
            collected.commits += count
        unused = and_(Blob.removing_at.is_(None), *_unused(before, now))
        while claimed := _claim(resources, run, now, or_(unused, _marked_by_others(run))):
            _remove(resources, run, claimed, collected)
        for batch in _orphans(resources, before, now):
            claimed = _claim_orphans(resources, run, now, {stat.sha256: stat.size_bytes for stat in batch})
            _remove(resources, run, claimed, collected)
    return collected


def remove_marked(resources: Resources) -> bool:
    """Removes the blobs that a takedown has marked. False if a collection is running: that one or the next will remove
    them."""
    run, now = uuid.uuid4().hex, resources.clock()
    try:
        with exclusive_collection(resources.database):
            while claimed := _claim(resources, run, now, _marked_by_others(run)):
                _remove(resources, run, claimed, Collected())
    except Conflict as error:
        if error.code != "collecting":
            raise
        return False
    return True


def discard(resources: Resources, digests: Iterable[Digest]) -> None:
    """Immediately removes bytes made for a release that is not published. Keeps bytes that have a row, or that others
    announced. While a collection runs, the bytes stay for a later one."""
    run, now = uuid.uuid4().hex, resources.clock()
    stats = [stat for digest in digests if (stat := resources.store.stat(digest)) is not None]
    try:
        with exclusive_collection(resources.database):
            claimed = _claim_orphans(resources, run, now, {stat.sha256: stat.size_bytes for stat in stats})
            _remove(resources, run, claimed, Collected())
    except Conflict as error:
        if error.code != "collecting":
            raise


def _take_down_expired(resources: Resources, now: datetime) -> int:
    """Takes down the releases that the namespaces' retention ends, one transaction each since a takedown holds locks.
    Returns their number."""
    operator, count = audit.operator_actor(resources.settings.user, now), 0
    while True:
        with resources.read() as session:
            expired = retention.expired(session, now, limit=_BATCH)
        if not expired:
            return count
        for release_id in expired:
            with resources.write() as session:
                count += retention.take_down_if_expired(session, operator, release_id)


@dataclass(frozen=True, slots=True)
class Swept:
    """`uploads` expired before their bytes came; `leftovers` are parts of these and files of dead processes."""

    uploads: int
    leftovers: int


def sweep(resources: Resources, now: datetime) -> Swept:
    """Expires old uploads, and removes leftovers of them and of dead processes.

    Safe while others upload: keeps everything younger than the upload expiry.
    """
    before = now - timedelta(seconds=resources.settings.upload_expires_s)
    forgotten = 0
    while (count := _forget_expired(resources, now)) is not None:
        forgotten += count
    with resources.write() as session:
        idempotency.expire_keys(session, now)
        checks.expire(session, now)
        fleet.forget(session, now)
        requests.expire(session, audit.operator_actor(resources.settings.user, now))
        audit.delete_downloads(session, now - timedelta(days=resources.settings.audit_reads_days))
        # Rows of finished pushes by `hf_xet`: their xorbs are unused blobs by then.
        over = select(XetUpload.id).where(XetUpload.expires_at < now)
        session.execute(delete(XetXorb).where(XetXorb.upload_id.in_(over)))
        session.execute(delete(XetUpload).where(XetUpload.expires_at < now))
    with resources.read() as session:
        live = set(session.scalars(select(Upload.id)))
    leftovers = resources.store.sweep(before, live)
    for pattern in _SCRATCH:
        leftovers += remove_stale(resources.work_directory.glob(pattern), before)
    leftovers += sweep_journals(resources.settings, now)
    return Swept(forgotten, leftovers)


def evaluation_journal(settings: Settings, identity: str) -> Path:
    """The file with the measurements of an interrupted evaluation on this machine."""
    return _evaluation_journals(settings) / f"{sha256(identity.encode()).hexdigest()[:32]}.jsonl"


def _evaluation_journals(settings: Settings) -> Path:
    return settings.home_directory.joinpath(*_JOURNALS)


def sweep_journals(settings: Settings, now: datetime) -> int:
    """Removes journals of evaluations that were not continued within the upload expiry. Returns their number."""
    before = now - timedelta(seconds=settings.upload_expires_s)
    return remove_stale(_evaluation_journals(settings).glob("*.jsonl"), before)


def _forget_expired(resources: Resources, now: datetime) -> int | None:
    """Removes the next expired uploads and returns how many of them had no bytes; None when there are no more. One
    transaction per batch, since there may be as many uploads as all users announced in a day."""
    operator = audit.operator_actor(resources.settings.user, now)
    with resources.write() as session:
        expired = select(Upload.id, ARRIVED).where(Upload.expires_at < now).limit(_UPLOADS_BATCH)
        arrived = dict(session.execute(expired).all())
        if not arrived:
            return None
        still = (Upload.id.in_(arrived), Upload.expires_at < now)  # and not announced again meanwhile
        unfinished = [
            row for row in session.scalars(delete(Upload).where(*still).returning(Upload)).all() if not arrived[row.id]
        ]
        for row in unfinished:  # its bytes became a blob, whose collection has a row of its own
            lost = {"size_bytes": row.size_bytes, "created_by": row.created_by}
            audit.record(session, operator, Act.UPLOAD_EXPIRE, row.sha256, namespace=row.namespace, before=lost)
    return len(unfinished)


def _forget(
    resources: Resources, forget: Callable[[Session, audit.Actor, datetime, int], int], before: datetime
) -> int:
    """Removes the next commits or jobs from before that time, and returns their number."""
    operator = audit.operator_actor(resources.settings.user, resources.clock())
    with resources.write() as session:
        return forget(session, operator, before, _BATCH)


def _unused(
    before: datetime, now: datetime, forgotten: ColumnElement[bool] | None = None
) -> tuple[ColumnElement[bool], ...]:
    """The conditions of a blob that nothing names; files that are `forgotten` name nothing."""
    return (
        Blob.created_at < before,
        ~exists().where(RevisionFile.sha256 == Blob.sha256, ~(false() if forgotten is None else forgotten)),
        ~exists().where(Score.results_sha256 == Blob.sha256),
        ~exists().where(Upload.sha256 == Blob.sha256, Upload.expires_at >= now),
    )


def _marked_by_others(run: str) -> ColumnElement[bool]:
    """The condition of a blob that a dead collection or a takedown had marked."""
    return and_(Blob.removing_at.is_not(None), Blob.removing_by != run)


def _claim(resources: Resources, run: str, now: datetime, free: ColumnElement[bool]) -> dict[Digest, int]:
    """Marks the next blobs among those that are `free` for removal by this run."""
    with resources.write() as session:
        lock_blobs_exclusive(session)
        chosen = select(Blob.sha256).where(free).limit(_BATCH)
        marked = update(Blob).where(Blob.sha256.in_(chosen)).values(removing_at=now, removing_by=run)
        rows = session.execute(marked.returning(Blob.sha256, Blob.size_bytes), execution_options=_UNTRACKED).all()
    return {Digest(sha256): size_bytes for sha256, size_bytes in rows}


def _orphans(resources: Resources, before: datetime, now: datetime) -> Iterator[list[BlobStat]]:
    """Removes bytes without a row that have been in the store for longer than the grace period, in batches."""
    old = (stat for stat in resources.store.iterate() if stat.written_at < before)
    while batch := list(islice(old, _BATCH)):
        with resources.read() as session:
            wanted = _wanted(session, [stat.sha256 for stat in batch], now)
        if orphans := [stat for stat in batch if stat.sha256 not in wanted]:
            yield orphans


def _claim_orphans(resources: Resources, run: str, now: datetime, sizes: dict[Digest, int]) -> dict[Digest, int]:
    """Adds a marked row for each, unless the same bytes were announced or completed meanwhile."""
    with resources.write() as session:
        lock_blobs_exclusive(session)
        wanted = _wanted(session, sizes, now)
        claimed = {sha256: size_bytes for sha256, size_bytes in sizes.items() if sha256 not in wanted}
        rows = [
            {"sha256": sha256, "size_bytes": size_bytes, "created_at": now, "removing_at": now, "removing_by": run}
            for sha256, size_bytes in claimed.items()
        ]
        if rows:
            session.execute(insert(Blob), rows)
    return claimed


def _remove(resources: Resources, run: str, claimed: dict[Digest, int], collected: Collected) -> None:
    for digest in claimed:
        resources.store.delete(digest)
    operator = audit.operator_actor(resources.settings.user, resources.clock())
    with resources.write() as session:
        session.execute(delete(Blob).where(Blob.sha256.in_(claimed), Blob.removing_by == run))
        for sha256, size_bytes in claimed.items():
            gone = {"size_bytes": size_bytes}
            audit.record(session, operator, Act.BLOB_COLLECT, sha256, namespace=None, before=gone, run=run)
    collected.blobs += len(claimed)
    collected.size_bytes += sum(claimed.values())


def _wanted(session: Session, digests: Iterable[Digest], now: datetime) -> set[str]:
    """The digests that have a row or an announced upload."""
    asked = list(digests)
    known = select(Blob.sha256).where(Blob.sha256.in_(asked))
    announced = select(Upload.sha256).where(Upload.sha256.in_(asked), Upload.expires_at >= now)
    return {*session.scalars(known), *session.scalars(announced)}
