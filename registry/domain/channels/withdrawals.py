"""Withdrawals: releases that are yanked or taken down."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

from sqlalchemy import delete, exists, select, update
from sqlalchemy.orm import Session

from registry.database.locks import lock_blobs_exclusive
from registry.database.tables import (
    Blob,
    BlobHolder,
    Commit,
    Release,
    ReleaseWord,
    Repository,
    Revision,
    RevisionFile,
    Score,
    Upload,
)
from registry.database.tables.catalog import new_stamp
from registry.domain.access import audit, namespaces
from registry.domain.access.audit import Act, Actor
from registry.domain.catalog import barred, releases, repositories, search_index
from registry.domain.catalog.releases import full_name
from registry.domain.channels.serving import (
    UNYANK,
    YANK,
    ServedChange,
    refresh_served,
)
from registry.errors import Usage
from registry.formats.manifest import parse_manifest

_UNTRACKED = {"synchronize_session": False}
Outcome = TypeVar("Outcome")
TAKEN_DOWN_BY = "takedown"
"""The value of `Blob.removing_by` while no collection has begun the removal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Takedown:
    """`releases` have lost their files. `blobs` of `size_bytes` are removed, since nothing names them any more.
    `kept_files` has the paths of files that stay, by the releases and commits that still have them. `barred` are the
    paths of the
    weights that the namespace may not publish again."""

    releases: list[str]
    blobs: int
    size_bytes: int
    kept_files: dict[str, list[str]]
    barred: list[str]

    @property
    def named_by(self) -> list[str]:
        return list(self.kept_files)


def take_down(session: Session, actor: Actor, release: Release, reason: str) -> Takedown:
    """Removes like `remove_files`. Raises Refused if the namespace requires a second admin."""
    namespaces.refuse_alone(actor, namespaces.find(session, release.repository.namespace))
    return remove_files(session, actor, release, reason)


def remove_files(session: Session, actor: Actor, release: Release, reason: str, *, bar: bool = True) -> Takedown:
    """Takes the files of a release down, and yanks every version that has the same ones. Keeps the record of the
    publication; removes notes and provenance, since they may repeat what must not be seen.

    With `bar`, the namespace may not publish the same files or weights again (`barred.refuse_files`). Files that
    another release or commit names stay. The blobs of the others are marked, so that nobody relies on them: the caller,
    or the next collection, removes their bytes. Repeated, it changes nothing.
    """
    need_reason("A takedown", release, reason)
    repositories.lock(session, release.repository_id)
    lock_blobs_exclusive(session)  # blocks publications of these files
    revision = release.revision
    session.refresh(revision, ["taken_down_at", "takedown_reason"])
    versions = session.scalars(select(Release).where(Release.revision_id == revision.id).order_by(Release.id)).all()
    names = [full_name(version) for version in versions]
    if revision.taken_down_at is not None:
        return Takedown(releases=names, blobs=0, size_bytes=0, kept_files={}, barred=[])
    digests = list(session.scalars(select(RevisionFile.sha256).where(RevisionFile.revision_id == revision.id)))
    revision.taken_down_at, revision.takedown_reason, revision.barred = actor.at, reason, bar
    for version in versions:
        _bury(session, actor, version, reason)
    session.execute(delete(Commit).where(Commit.revision_id == revision.id), execution_options=_UNTRACKED)
    session.execute(delete(RevisionFile).where(RevisionFile.revision_id == revision.id), execution_options=_UNTRACKED)
    session.flush()
    session.expire(revision, ["files"])
    namespace = release.repository.namespace
    marked = _mark_unnamed(session, actor, namespace, digests)
    weights = barred.gone_weights(session, namespace, parse_manifest(revision.manifest)) if bar else []
    return Takedown(
        releases=names,
        blobs=len(marked),
        size_bytes=sum(marked),
        kept_files=_kept_files(session, namespace, digests),
        barred=[file.path for file in weights],
    )


def _bury(session: Session, actor: Actor, release: Release, reason: str) -> None:
    """Yanks a release and empties its texts."""
    repository = release.repository
    if not release.yanked:
        yank(session, actor, release, reason)
    else:  # a channel may have kept it
        refresh_served(session, actor, repository, YANK, reason)
    release.notes, release.provenance, release.stamp = "", {}, new_stamp()
    kept = search_index.namespace_terms(repository.namespace, repository.name)
    kept += search_index.text_terms(f"{repository.namespace} {repository.name}")
    others = delete(ReleaseWord).where(ReleaseWord.release_id == release.id, ReleaseWord.word.not_in(kept))
    session.execute(others, execution_options=_UNTRACKED)
    name, after = full_name(release), {"commit": release.revision.commit, "size_bytes": release.size_bytes}
    audit.record(session, actor, Act.RELEASE_TAKEDOWN, name, namespace=repository.namespace, reason=reason, after=after)


def _mark_unnamed(session: Session, actor: Actor, namespace: str, digests: Sequence[str]) -> list[int]:
    """Marks the blobs that nothing names any more, and returns their sizes. The namespace gives up blobs that only
    other namespaces name, with their announced uploads."""
    named = exists().where(RevisionFile.sha256 == Blob.sha256)
    named_here = (
        exists()
        .where(RevisionFile.sha256 == BlobHolder.sha256, RevisionFile.revision_id == Revision.id)
        .where(Revision.repository_id == Repository.id, Repository.namespace == namespace)
    )
    given_up = delete(BlobHolder).where(BlobHolder.namespace == namespace, BlobHolder.sha256.in_(digests), ~named_here)
    gone = [row.sha256 for row in session.execute(given_up.returning(BlobHolder.sha256), execution_options=_UNTRACKED)]
    announced = delete(Upload).where(Upload.namespace == namespace, Upload.sha256.in_(gone))
    session.execute(announced, execution_options=_UNTRACKED)
    unnamed = (
        Blob.sha256.in_(digests),
        Blob.removing_at.is_(None),
        ~named,
        ~exists().where(Score.results_sha256 == Blob.sha256),
        ~exists().where(BlobHolder.sha256 == Blob.sha256),  # another namespace has sent it and may publish it
    )
    marked = update(Blob).where(*unnamed).values(removing_at=actor.at, removing_by=TAKEN_DOWN_BY)
    rows = session.execute(marked.returning(Blob.size_bytes), execution_options=_UNTRACKED)
    return [row.size_bytes for row in rows]


def _kept_files(session: Session, namespace: str, digests: Sequence[str]) -> dict[str, list[str]]:
    """The files that other releases and commits of the namespace still have: paths by their names."""
    query = (
        select(Repository.name, Revision.id, Revision.commit, RevisionFile.path)
        .join(Revision, Revision.repository_id == Repository.id)
        .join(RevisionFile, RevisionFile.revision_id == Revision.id)
        .where(Repository.namespace == namespace, RevisionFile.sha256.in_(digests))
        .order_by(Repository.name, Revision.id, RevisionFile.path)
    )
    kept: dict[str, list[str]] = {}
    for (repository, revision_id, commit), rows in groupby(session.execute(query).all(), lambda row: row[:3]):
        versions = session.scalars(select(Release.version).where(Release.revision_id == revision_id)).all()
        paths = [row.path for row in rows]
        for mark in [f":{version}" for version in versions] or [f"#{commit[:12]}"]:
            kept[f"{namespace}/{repository}{mark}"] = paths
    return kept


# A yanked release is excluded from ranges and channels.


def yank(session: Session, actor: Actor, release: Release, reason: str) -> list[ServedChange]:
    """Yanks a release: ranges and rollbacks skip it, and so do channels, unless their policies keep it; its exact
    version and commit resolve with a warning. Returns the channels that serve another release now.

    A yanked release gets the new reason; the same reason again is a retry.
    """
    need_reason("A yank", release, reason)
    _lock(session, release)
    if release.yanked and release.yank_reason == reason:
        return []
    return _set_yank(session, actor, release, Act.RELEASE_YANK, reason, yank_reason=reason)


def unyank(session: Session, actor: Actor, release: Release, reason: str) -> list[ServedChange]:
    """Undoes a yank. Returns the channels that serve another release now. For a release that is not yanked, does
    nothing and writes no audit row: it may be a retry. Raises Refused for one that was taken down."""
    need_reason("An unyank", release, reason)
    _lock(session, release)
    releases.refuse_taken_down(full_name(release), release.revision)
    if not release.yanked:
        return []
    return _set_yank(session, actor, release, Act.RELEASE_UNYANK, reason, yank_reason=None)


def preview(session: Session, act: Callable[[], Outcome]) -> Outcome:
    """The changes that a yank, an unyank or a takedown would make: the act is done and undone."""
    attempt = session.begin_nested()
    try:
        return act()
    finally:
        attempt.rollback()


def need_reason(act: str, release: Release, reason: str) -> None:
    """Raises Usage for a blank reason."""
    if not reason.strip():
        raise Usage("reason_missing", f"{act} needs a reason.", subject=full_name(release))


def _lock(session: Session, release: Release) -> None:
    """Serializes yanks, so that the audit's `before` is right, and channel creation in the repository. A concurrent
    move either sees the yank, or the yank sees the move (`refresh_served`)."""
    repositories.lock(session, release.repository_id)
    session.refresh(release, ["yanked", "yank_reason"])


def _set_yank(
    session: Session, actor: Actor, release: Release, act: Act, reason: str, *, yank_reason: str | None
) -> list[ServedChange]:
    before = {"yanked": release.yanked, "yank_reason": release.yank_reason}
    release.yanked, release.yank_reason = yank_reason is not None, yank_reason
    release.yanked_at = actor.at if release.yanked else None
    session.flush()
    audit.record(
        session,
        actor,
        act,
        full_name(release),
        namespace=release.repository.namespace,
        reason=reason,
        before=before,
        after={"yanked": release.yanked, "yank_reason": release.yank_reason},
    )
    return refresh_served(session, actor, release.repository, YANK if release.yanked else UNYANK, reason)
