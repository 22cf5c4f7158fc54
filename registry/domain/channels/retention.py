"""Retention: the releases that the rules of their namespaces take down, and what spares some of them."""

from collections.abc import Iterator
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, and_, exists, false, or_, select
from sqlalchemy.orm import Session, aliased

from registry.database.tables import (
    Channel,
    Commit,
    FleetNode,
    FleetRelease,
    Move,
    Namespace,
    Release,
    ReleaseInput,
    Repository,
    Revision,
)
from registry.domain.access.audit import Actor
from registry.domain.access.quotas import RetentionPolicy
from registry.domain.catalog import repositories
from registry.domain.catalog.releases import full_name
from registry.domain.channels.withdrawals import remove_files
from registry.wire.access import PlannedRemoval

_twin, _later = aliased(Release), aliased(Commit)
_SAME_FILES = _twin.revision_id == Release.revision_id
_IS_SERVED = exists().where(_SAME_FILES, Channel.served_id == _twin.id)
_IS_INPUT = exists().where(_SAME_FILES, ReleaseInput.input_id == _twin.id)
_IS_LOADED = exists().where(_SAME_FILES, FleetRelease.release_id == _twin.id)
_IS_ON_MAIN = exists().where(
    Commit.revision_id == Release.revision_id,
    ~exists().where(_later.repository_id == Commit.repository_id, _later.id > Commit.id),
)


def expired(session: Session, now: datetime, *, limit: int | None, loaded: bool = False) -> list[int]:
    """The releases that the retention of their namespaces takes down now: those that are old enough, without those that
    a channel serves, that a node of the fleet has loaded, whose files `main` has, or that another release was composed
    of. With `loaded`, those that stay only because a node has them loaded."""
    stated = (Namespace.keep_yanked_days, Namespace.keep_prerelease_days, Namespace.keep_channel_days)
    rows = select(Namespace).where(or_(*(column.is_not(None) for column in stated)))
    ids: list[int] = []
    for row in session.scalars(rows).all():
        gone = _expired_in(row.name, RetentionPolicy.of(row), now, loaded=loaded)
        query = select(Release.id).where(*gone).order_by(Release.id)
        ids += session.scalars(query.limit(limit - len(ids) if limit is not None else None))
    return ids


def take_down_if_expired(session: Session, operator: Actor, release_id: int) -> bool:
    """Takes a release down if its namespace's retention still requires it."""
    release = session.get_one(Release, release_id)
    row = session.get_one(Namespace, release.repository.namespace)
    repositories.lock(session, release.repository_id)
    policy = RetentionPolicy.of(row)
    gone = _expired_in(row.name, policy, operator.at)
    if session.scalar(select(Release.id).where(Release.id == release_id, *gone)) is None:
        return False
    reason = f"the namespace keeps {_rule(session, release, policy, operator.at)}"
    remove_files(session, operator, release, reason, bar=False)
    return True


def plan(session: Session, namespace: str, policy: RetentionPolicy, now: datetime, limit: int) -> list[PlannedRemoval]:
    """What the next collection takes down under this policy, and what it spares, oldest first."""
    query = select(Release).where(*_old_in(namespace, policy, now)).order_by(Release.id).limit(limit)
    return [
        PlannedRemoval(
            release=full_name(release),
            size_bytes=release.size_bytes,
            reason=f"keeps {_rule(session, release, policy, now)}",
            spared_by=", ".join(_spared_by(session, release, policy, now)),
        )
        for release in session.scalars(query)
    ]


def _spared_by(session: Session, release: Release, policy: RetentionPolicy, now: datetime) -> Iterator[str]:
    for words, condition in (
        ("a channel serves it", _IS_SERVED),
        ("another release was composed of it", _IS_INPUT),
        ("main has its files", _IS_ON_MAIN),
        ("another version has its files", exists().where(_SAME_FILES, ~_is_old(_twin, policy, now))),
    ):
        if session.scalar(select(Release.id).where(Release.id == release.id, condition)) is not None:
            yield words
    nodes = select(FleetNode.group, FleetNode.node).join(FleetRelease).where(FleetRelease.release_id == release.id)
    yield from (f"{group}/{name} has it loaded" for group, name in session.execute(nodes.limit(3)))


def _old_in(namespace: str, policy: RetentionPolicy, now: datetime) -> tuple[ColumnElement[bool], ...]:
    return (
        _is_old(Release, policy, now),
        exists().where(Repository.id == Release.repository_id, Repository.namespace == namespace),
        exists().where(Revision.id == Release.revision_id, Revision.taken_down_at.is_(None)),
    )


def _expired_in(
    namespace: str, policy: RetentionPolicy, now: datetime, *, loaded: bool = False
) -> tuple[ColumnElement[bool], ...]:
    return (
        *_old_in(namespace, policy, now),
        ~exists().where(_SAME_FILES, ~_is_old(_twin, policy, now)),
        ~_IS_SERVED,
        ~_IS_INPUT,
        _IS_LOADED if loaded else ~_IS_LOADED,
        ~_IS_ON_MAIN,
    )


def _is_old(release: type[Release], policy: RetentionPolicy, now: datetime) -> ColumnElement[bool]:
    """Whether a release, or an alias of the table, is old enough for one of the rules."""
    return or_(
        false(), *(condition(release, policy, now) for condition in (_old_yank, _old_prerelease, _left_its_channels))
    )


def _old_yank(release: type[Release], policy: RetentionPolicy, now: datetime) -> ColumnElement[bool]:
    if policy.keep_yanked_days is None:
        return false()
    before = now - timedelta(days=policy.keep_yanked_days)
    return and_(release.yanked, release.yanked_at.is_not(None), release.yanked_at < before)


def _old_prerelease(release: type[Release], policy: RetentionPolicy, now: datetime) -> ColumnElement[bool]:
    if policy.keep_prerelease_days is None:
        return false()
    return and_(~release.stable, release.created_at < now - timedelta(days=policy.keep_prerelease_days))


def _left_its_channels(release: type[Release], policy: RetentionPolicy, now: datetime) -> ColumnElement[bool]:
    """A channel has served it, and each move to it or from it is of a channel with a rule, and older than that."""
    if not policy.keep_channel_days:
        return false()
    settled = or_(
        *(
            and_(Channel.name == name, Move.at < now - timedelta(days=days))
            for name, days in policy.keep_channel_days.items()
        )
    )
    of_release = or_(Move.to_release_id == release.id, Move.from_release_id == release.id)
    return and_(
        exists().where(Move.to_release_id == release.id),
        ~exists().where(of_release, Channel.id == Move.channel_id, ~settled),
    )


def _rule(session: Session, release: Release, policy: RetentionPolicy, now: datetime) -> str:
    """The rule by which the release goes, in words: `pre-releases for 90 days`."""
    for condition, what, days in (
        (_old_yank, "yanked releases", policy.keep_yanked_days),
        (_old_prerelease, "pre-releases", policy.keep_prerelease_days),
    ):
        if session.scalar(select(Release.id).where(Release.id == release.id, condition(Release, policy, now))):
            return f"{what} for {_days(days or 0)}"
    served = select(Channel.name).join(Move, Move.channel_id == Channel.id).where(Move.to_release_id == release.id)
    names = sorted(set(session.scalars(served)))
    days_of = policy.keep_channel_days or {}
    return ", ".join(f"what {name} served for {_days(days_of[name])} afterwards" for name in names if name in days_of)


def _days(days: int) -> str:
    return f"{days} day{'' if days == 1 else 's'}"
