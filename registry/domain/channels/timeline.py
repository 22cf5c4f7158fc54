"""Reads moves: of a channel, of a release, the latest of the registry; and the releases that channels serve now."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import bindparam, func, select
from sqlalchemy.orm import Session

from registry.database.dialects import in_list, padded
from registry.database.prepared import Prepared, Query, prepared
from registry.database.tables import Channel, Move, Release, Repository
from registry.domain.access.audit import Actor
from registry.domain.access.roles import readable_names

LATEST_AMONG = 2_000
"""`latest` reads this many of a registry's last moves, so that a caller who may see few of them waits no longer."""

_channel, _move, _release, _repository = (table.__table__.c for table in (Channel, Move, Release, Repository))
LEFT = Release.__table__.alias("left")
"""The release that a move leaves."""
_VERSIONS = [LEFT.c.version.label("from_version"), _release.version.label("to_version")]
COLUMNS = [_move.id, _move.kind, *_VERSIONS, _move.actor, _move.reason, _move.forced, _move.gates, _move.at]
"""The columns of a `ChannelMove`, named as its fields."""
_HISTORY = (
    select(*COLUMNS)
    .select_from(Move.__table__)
    .join(Release.__table__, _release.id == _move.to_release_id)
    .outerjoin(LEFT, LEFT.c.id == _move.from_release_id)
    .where(_move.channel_id == bindparam("channel"))
    .order_by(_move.id.desc())
)
_OF_RELEASE = (
    select(_channel.name.label("channel"), *COLUMNS)
    .select_from(Channel.__table__)
    .join(Move.__table__, _move.channel_id == _channel.id)
    .join(Release.__table__, _release.id == _move.to_release_id)
    .outerjoin(LEFT, LEFT.c.id == _move.from_release_id)
    .where(
        _channel.repository_id == bindparam("repository"),
        (_move.to_release_id == bindparam("release")) | (_move.from_release_id == bindparam("release")),
    )
    .order_by(_move.id.desc())
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelMove:
    """A channel's move; `gates` are the recorded results, empty where they were not read. `changed` is false for a
    promotion to the release that the channel already served: the move is then its last one."""

    id: int
    kind: str
    from_version: str | None
    to_version: str
    actor: str
    reason: str
    forced: bool
    gates: Sequence[Mapping[str, Any]] = ()
    at: datetime
    changed: bool = True

    @classmethod
    def of_row(cls, row: Any) -> "ChannelMove":
        """From a row with the columns `COLUMNS`, possibly without gates or with further columns."""
        columns = row._asdict()
        return cls(**{name: columns[name] for name in cls.__dataclass_fields__ if name in columns})

    @classmethod
    def recorded(
        cls, move_id: int, values: Mapping[str, Any], from_version: str | None, to_version: str
    ) -> "ChannelMove":
        """From the inserted columns."""
        own = {name: values[name] for name in ("kind", "actor", "reason", "forced", "gates", "at")}
        return cls(id=move_id, from_version=from_version, to_version=to_version, **own)


@prepared
def _latest(everywhere: bool) -> Query:
    """The last moves of all repositories, or of those in the namespaces of the parameter."""
    query = (
        select(
            _repository.namespace,
            _repository.name.label("repository"),
            _channel.name.label("channel"),
            *(column for column in COLUMNS if column is not _move.gates),
        )
        .select_from(Move.__table__)
        .join(Channel.__table__, _channel.id == _move.channel_id)
        .join(Repository.__table__, _repository.id == _channel.repository_id)
        .join(Release.__table__, _release.id == _move.to_release_id)
        .outerjoin(LEFT, LEFT.c.id == _move.from_release_id)
        .where(_move.id > select(func.max(_move.id) - LATEST_AMONG).scalar_subquery())
        .order_by(_move.id.desc())
        .limit(bindparam("at_most"))
    )
    return query if everywhere else query.where(in_list(_repository.namespace, "namespaces"))


def history(session: Session, channel: Channel, *, before: int, limit: int) -> list[ChannelMove]:
    """Moves, newest first; `before` is the id of the last move of the previous page, 0 for the first page."""
    query = _HISTORY.where(_move.id < before) if before else _HISTORY
    return [ChannelMove.of_row(row) for row in session.execute(query.limit(limit), {"channel": channel.id})]


def latest(session: Session, actor: Actor, *, limit: int) -> list[tuple[str, str, ChannelMove]]:
    """The newest moves that the actor may read among the registry's last `LATEST_AMONG`, each with its repository and
    channel."""
    namespaces = readable_names(actor)
    values = {"namespaces": sorted(namespaces or ()), "at_most": limit}
    rows = _latest(namespaces is None).records(session, values)
    return [(f"{row.namespace}/{row.repository}", row.channel, ChannelMove.of_row(row)) for row in rows]


def of_release(session: Session, release: Release, *, before: int, limit: int) -> list[tuple[str, ChannelMove]]:
    """The moves of all channels to a release and away from it, each with its channel, newest first; `before` as in
    `history`."""
    query = _OF_RELEASE.where(_move.id < before) if before else _OF_RELEASE
    named = {"repository": release.repository_id, "release": release.id}
    return [(row.channel, ChannelMove.of_row(row)) for row in session.execute(query.limit(limit), named)]


# The channels that serve each release, for lists of releases of many repositories.

_channel, _release = Channel.__table__.c, Release.__table__.c
# Joined through the repository, which has an index; on columns, since mapped objects would take most of the time.
_SERVED = Prepared(
    select(_channel.served_id, _channel.name)
    .select_from(Release.__table__)
    .join(
        Channel.__table__,
        (_channel.repository_id == _release.repository_id) & (_channel.served_id == _release.id),
    )
    .where(in_list(_release.id, "releases"))
    .order_by(_channel.name)
)


def channels_of(session: Session, releases: Collection[int]) -> Mapping[int, list[str]]:
    """By id of these releases, the names of the channels that serve it now, in order.

    The caller has checked that they may be read.
    """
    serving: dict[int, list[str]] = {}
    for release, channel in _SERVED.rows(session, {"releases": padded(list(releases))}):
        serving.setdefault(release, []).append(channel)
    return serving
