"""The moves of a channel as they are told: its history, and what a request made when it came before."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry.models import Channel, Move, Release
from registry.releases import key_reused

_move, _release = Move.__table__.c, Release.__table__.c
LEFT = Release.__table__.alias("left")
"""The release that a move left; the one that it reached goes by its own name."""
_VERSIONS = [LEFT.c.version.label("from_version"), _release.version.label("to_version")]
TOLD = [_move.id, _move.kind, *_VERSIONS, _move.actor, _move.reason, _move.forced, _move.gates, _move.at]
"""What `Moved` holds, in its order."""
_MOVES = (
    select(*TOLD)
    .select_from(Move.__table__)
    .join(Release.__table__, _release.id == _move.to_release_id)
    .outerjoin(LEFT, LEFT.c.id == _move.from_release_id)
)


@dataclass(frozen=True, slots=True)
class Moved:
    """A move as it is told; `gates` are the results as they were written down."""

    id: int
    kind: str
    from_version: str | None
    to_version: str
    actor: str
    reason: str
    forced: bool
    gates: Sequence[Mapping[str, Any]]
    at: datetime


def history(session: Session, channel: Channel, *, before: int, limit: int) -> list[Moved]:
    """The newest move first; `before` is the id of the last move of the page before, 0 for the first page."""
    query = _MOVES.where(_move.channel_id == channel.id).order_by(_move.id.desc()).limit(limit)
    return [Moved(*row) for row in session.execute(query.where(_move.id < before) if before else query)]


def made_by(session: Session, channel_id: int, request_key: str | None, kind: str, version: str | None) -> Moved | None:
    """The move that the request made when it came before. Raises Conflict where it asked for another one then."""
    if not request_key:
        return None
    query = _MOVES.where(_move.channel_id == channel_id, _move.request_key == request_key)
    row = session.execute(query).first()
    if row is None:
        return None
    made = Moved(*row)
    if made.kind != kind or version not in (None, made.to_version):
        raise key_reused(request_key, f"a {made.kind} to {made.to_version}")
    return made
