"""Who did what: typed acts and the one event log."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry.models import AuditRow


@dataclass(frozen=True, slots=True)
class Actor:
    """Who acts, and when. `grants` maps a namespace, or `*` for all of them, to a role of `registry.access`."""

    name: str
    at: datetime
    grants: Mapping[str, str]


class Act(StrEnum):
    BASE_ADD = "base:add"
    BASE_UPDATE = "base:update"
    CHANNEL_PROMOTE = "channel:promote"
    CHANNEL_ROLLBACK = "channel:rollback"
    COMPOSITION_CANCEL = "composition:cancel"
    COMPOSITION_CREATE = "composition:create"
    GATE_SET = "gate:set"
    RELEASE_PUBLISH = "release:publish"
    RELEASE_UNYANK = "release:unyank"
    RELEASE_YANK = "release:yank"
    REPOSITORY_CREATE = "repository:create"
    SCORE_RECORD = "score:record"
    SUITE_ADD = "suite:add"


def record(session: Session, actor: Actor, act: Act, subject: object, **detail: Any) -> None:
    session.add(AuditRow(at=actor.at, actor=actor.name, act=act, subject=str(subject), detail=detail))


def events(session: Session, *, after: int = 0, limit: int = 100, subject: str | None = None) -> list[AuditRow]:
    query = select(AuditRow).where(AuditRow.id > after).order_by(AuditRow.id).limit(limit)
    if subject is not None:
        query = query.where(AuditRow.subject == subject)
    return list(session.scalars(query))
