"""Quotas of namespaces: bytes of the blobs that they have sent, and releases that have files."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Self

from sqlalchemy import case, func, select
from sqlalchemy.orm import Session

from registry.database.tables import Blob, BlobHolder, Namespace, Release, Repository, Revision, Upload, XetUpload
from registry.domain.access import audit
from registry.domain.access.audit import Act, Actor
from registry.domain.access.namespaces import refuse_alone
from registry.errors import Refused


@dataclass(frozen=True, slots=True)
class Quota:
    """The most that a namespace may hold; None without a limit."""

    max_bytes: int | None = None
    max_releases: int | None = None


@dataclass(frozen=True, slots=True)
class RetentionPolicy:
    """Days after which `gc` takes down yanked releases and pre-releases that no channel serves; None keeps them.
    `keep_channel_days` has, by the name of a channel, the days for releases that it has served last so long ago, if no
    channel without such a rule has ever served them."""

    keep_yanked_days: int | None = None
    keep_prerelease_days: int | None = None
    keep_channel_days: Mapping[str, int] | None = None

    @classmethod
    def of(cls, row: Namespace) -> Self:
        return cls(row.keep_yanked_days, row.keep_prerelease_days, row.keep_channel_days)


@dataclass(frozen=True, slots=True)
class Holdings:
    """The current contents of a namespace. `size_bytes` counts each blob once, announced uploads, and data sent in
    chunks (unpacked) before it becomes a file."""

    size_bytes: int
    releases: int


def measure(session: Session, namespace: str, now: datetime) -> Holdings:
    """The current contents of the namespace."""
    return Holdings(_held_bytes(session, namespace, now), _count_releases(session, namespace))


def set_limits(session: Session, actor: Actor, row: Namespace, wanted: Quota | RetentionPolicy) -> None:
    """Sets the columns named like its fields. Existing contents stay. Raises Refused for a retention that needs a
    second admin."""
    if isinstance(wanted, RetentionPolicy):
        refuse_alone(actor, row)
    after = asdict(wanted)
    before = {name: getattr(row, name) for name in after}
    for name, value in after.items():
        setattr(row, name, value)
    if before != after:
        audit.record(session, actor, Act.NAMESPACE_SET, row.name, namespace=row.name, before=before, after=after)


def refuse_bytes(session: Session, namespace: str, more: int, now: datetime) -> None:
    """Raises Refused if the namespace may not hold `more` bytes. Announcements wait for each other where there is a
    quota, so that two of them cannot both use what is left."""
    limit = session.scalar(select(Namespace.max_bytes).where(Namespace.name == namespace))
    if limit is None or more == 0:
        return
    session.get(Namespace, namespace, with_for_update=True)
    held = _held_bytes(session, namespace, now)
    if held + more > limit:
        raise _exceeded(namespace, f"may hold {limit:,} bytes and holds {held:,}: {more:,} more do not fit")


def refuse_release(session: Session, namespace: str) -> None:
    """Raises Refused if the namespace may not have one more release. Publications wait for each other where there is a
    quota."""
    limited = select(Namespace.max_releases).where(Namespace.name == namespace, Namespace.max_releases.is_not(None))
    limit = session.scalar(limited.with_for_update())
    if limit is not None and (held := _count_releases(session, namespace)) >= limit:
        raise _exceeded(namespace, f"may have {limit:,} releases and has {held:,}")


def _count_releases(session: Session, namespace: str) -> int:
    counted = select(func.count()).select_from(Release).join(Repository, Repository.id == Release.repository_id)
    counted = counted.join(Revision, Revision.id == Release.revision_id)
    return session.scalar(counted.where(Repository.namespace == namespace, Revision.taken_down_at.is_(None))) or 0


def _held_bytes(session: Session, namespace: str, now: datetime) -> int:
    held = select(func.coalesce(func.sum(Blob.size_bytes), 0)).join(BlobHolder, BlobHolder.sha256 == Blob.sha256)
    held = held.where(BlobHolder.namespace == namespace)
    sent = select(BlobHolder.sha256).where(BlobHolder.namespace == namespace)
    coming = select(func.coalesce(func.sum(Upload.size_bytes), 0)).where(
        Upload.namespace == namespace, Upload.expires_at >= now, Upload.sha256.not_in(sent)
    )
    # Xorbs take little room until a shard makes files of them.
    packed = case((XetUpload.sent_bytes > XetUpload.made_bytes, XetUpload.sent_bytes - XetUpload.made_bytes), else_=0)
    pushed = select(func.coalesce(func.sum(packed), 0)).where(
        XetUpload.namespace == namespace, XetUpload.expires_at >= now
    )
    return sum(int(session.scalar(query) or 0) for query in (held, coming, pushed))


def _exceeded(namespace: str, what: str) -> Refused:
    return Refused("quota_exceeded", f"{namespace} {what}.", subject=namespace)
