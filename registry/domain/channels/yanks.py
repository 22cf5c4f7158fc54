"""Yank: exclude a release from ranges and channels; and unyank."""

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry.database.tables import Channel, Release
from registry.domain.access import audit
from registry.domain.access.audit import Act, Actor
from registry.domain.catalog import releases, repositories
from registry.domain.catalog.releases import full_name
from registry.domain.channels import moves
from registry.errors import Usage


def yank(session: Session, actor: Actor, release: Release, reason: str) -> Release:
    """Yanks a release: ranges, channels and rollbacks skip it; its exact version and commit resolve with a warning.

    A yanked release gets the new reason; the same reason again is a retry.
    """
    need_reason("A yank", release, reason)
    _lock(session, release)
    if not (release.yanked and release.yank_reason == reason):
        _set_yank(session, actor, release, Act.RELEASE_YANK, reason, yank_reason=reason)
    return release


def unyank(session: Session, actor: Actor, release: Release, reason: str) -> Release:
    """Undoes a yank. For a release that is not yanked, does nothing and writes no audit row: it may be a retry. Raises
    Refused for one that was taken down."""
    need_reason("An unyank", release, reason)
    _lock(session, release)
    releases.refuse_taken_down(full_name(release), release.revision)
    if release.yanked:
        _set_yank(session, actor, release, Act.RELEASE_UNYANK, reason, yank_reason=None)
    return release


def need_reason(act: str, release: Release, reason: str) -> None:
    """Raises Usage for a blank reason."""
    if not reason.strip():
        raise Usage("reason_missing", f"{act} needs a reason.", subject=full_name(release))


def _lock(session: Session, release: Release) -> None:
    """Serializes yanks, so that the audit's `before` is right, and channel creation in the repository. A concurrent
    move either sees the yank or is seen by it (`_channels_of`)."""
    repositories.lock(session, release.repository_id)
    session.refresh(release, ["yanked", "yank_reason"])


def _set_yank(
    session: Session, actor: Actor, release: Release, act: Act, reason: str, *, yank_reason: str | None
) -> None:
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
    for channel in _channels_of(session, release):
        served = moves.effective_move(session, channel)
        channel.served_id = served.to_release_id if served else None
        channel.served_key = served.to_release.sort_key if served else None


def _channels_of(session: Session, release: Release) -> list[Channel]:
    """All channels of the repository, locked: what any of them serves may change."""
    query = select(Channel).where(Channel.repository_id == release.repository_id).order_by(Channel.id)
    return list(session.scalars(query.with_for_update().execution_options(populate_existing=True)))
