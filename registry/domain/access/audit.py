"""The audit log: typed acts and their records."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from datetime import datetime
from enum import StrEnum
from threading import Lock
from typing import Any, cast

from sqlalchemy import ColumnElement, Select, Table, delete, insert, select, true
from sqlalchemy.orm import InstrumentedAttribute, Session

from registry.database.tables import AuditRow
from registry.domain.access import outbox

_audit = cast(Table, AuditRow.__table__)
_INSERT = insert(_audit).returning(_audit.c.id)


@dataclass(frozen=True, slots=True)
class Actor:
    """The actor of a change, with its time, token and address. `registry.domain.access.roles` defines the
    grants.

    `grants` maps a namespace, `*` for all, or one repository (NAMESPACE/NAME) to a role; `public` are the namespaces
    that everyone may read. `mints` tells whether the actor may create tokens, which a scoped token may not.
    """

    name: str
    at: datetime
    grants: Mapping[str, str]
    _: KW_ONLY
    public: frozenset[str] = field(default=frozenset())
    token_id: str | None = None
    source: str | None = None
    mints: bool = False
    seconded_by: str | None = None
    """The admin who approved what the actor requested."""
    hidden: Mapping[str, str] = field(default_factory=dict[str, str])
    """The user's own roles where the token's scope allows a lower one or none."""


def operator_actor(name: str, at: datetime) -> Actor:
    """The operator: runs commands on the registry's own machine, without access checks."""
    return Actor(name, at, {})


class Act(StrEnum):
    """The kinds of change that the audit log records: `noun:verb`."""

    BASE_ADD = "base:add"
    BASE_DEPRECATE = "base:deprecate"
    BASE_UPDATE = "base:update"
    BLOB_COLLECT = "blob:collect"
    BLOB_DISCARD = "blob:discard"
    CHANGE_END = "change:end"
    CHANGE_REQUEST = "change:request"
    CHANNEL_CANARY = "channel:canary"
    CHANNEL_DELETE = "channel:delete"
    CHANNEL_PROMOTE = "channel:promote"
    CHANNEL_ROLLBACK = "channel:rollback"
    CHANNEL_YANK = "channel:yank"
    CHANNEL_UNYANK = "channel:unyank"
    CHANNEL_POLICY = "channel:policy"
    CHANNEL_WATCH = "channel:watch"
    COMPOSITION_CANCEL = "composition:cancel"
    COMPOSITION_CREATE = "composition:create"
    COMPOSITION_LOCK = "composition:lock"
    EVALUATION_REQUEST = "evaluation:request"
    FLEET_DRIFT = "fleet:drift"
    FLEET_RECOVER = "fleet:recover"
    GATE_SET = "gate:set"
    JOB_CANCEL = "job:cancel"
    JOB_END = "job:end"
    JOB_EXPIRE = "job:expire"
    JOB_PRIORITY = "job:priority"
    MEMBER_SET = "member:set"
    NAMESPACE_CREATE = "namespace:create"
    NAMESPACE_SET = "namespace:set"
    NODE_REMOVE = "node:remove"
    POLICY_EXCEPT = "policy:except"
    POLICY_SET = "policy:set"
    PUBLISHER_ADD = "publisher:add"
    PUBLISHER_REMOVE = "publisher:remove"
    PROMOTION_APPROVE = "promotion:approve"
    PROMOTION_CANCEL = "promotion:cancel"
    PROMOTION_END = "promotion:end"
    PROMOTION_REQUEST = "promotion:request"
    RELEASE_DEPRECATE = "release:deprecate"
    RELEASE_DOWNLOAD = "release:download"
    RELEASE_PUBLISH = "release:publish"
    RELEASE_SIGN = "release:sign"
    RELEASE_TAKEDOWN = "release:takedown"
    RELEASE_UNYANK = "release:unyank"
    RELEASE_YANK = "release:yank"
    REPOSITORY_COMMIT = "repository:commit"
    REPOSITORY_CREATE = "repository:create"
    REPOSITORY_FORGET = "repository:forget"
    SCORE_DELETE = "score:delete"
    SCORE_RECORD = "score:record"
    SESSION_BEGIN = "session:begin"
    SESSION_END = "session:end"
    SESSION_REFUSE = "session:refuse"
    SUITE_ADD = "suite:add"
    SUITE_SHARE = "suite:share"
    SUITE_METRIC = "suite:metric"
    TOKEN_CREATE = "token:create"  # noqa: S105  (the name of an act)
    TOKEN_EXCHANGE = "token:exchange"  # noqa: S105
    TOKEN_REFUSE = "token:refuse"  # noqa: S105
    TOKEN_REVOKE = "token:revoke"  # noqa: S105
    UPLOAD_EXPIRE = "upload:expire"
    USER_LINK = "user:link"
    USER_REMOVE = "user:remove"
    WEBHOOK_ADD = "webhook:add"
    WEBHOOK_REMOVE = "webhook:remove"
    WEBHOOK_REPLAY = "webhook:replay"
    WEBHOOK_ROTATE = "webhook:rotate"
    WEBHOOK_TEST = "webhook:test"
    WORKER_REGISTER = "worker:register"
    WORKER_REVOKE = "worker:revoke"


def record(  # noqa: PLR0913
    session: Session,
    actor: Actor,
    act: Act,
    subject: object,
    *,
    namespace: str | None,
    reason: str | None = None,
    before: Mapping[str, Any] | None = None,
    after: Mapping[str, Any] | None = None,
    **detail: Any,
) -> int:
    """Records an act, also as an event for webhooks, and returns the id of the row. Admins of `namespace` may read it,
    with None only registry admins; `before` and `after` are what changed."""
    values = {
        "at": actor.at,
        "actor": actor.name,
        "act": act,
        "subject": str(subject),
        "namespace": namespace,
        "token_id": actor.token_id,
        "source": actor.source,
        "reason": reason or None,
        "before": dict(before) if before is not None else None,
        "after": dict(after) if after is not None else None,
        "detail": detail | ({"seconded_by": actor.seconded_by} if actor.seconded_by else {}),
    }
    audit_id = session.scalars(_INSERT, values).one()
    if event := outbox.event_of(act, after):
        outbox.announce(session, audit_id, event, str(subject), namespace, actor.at)
    return audit_id


@dataclass(frozen=True, slots=True, kw_only=True)
class EventQuery:
    """`visible` is the condition for the rows of namespaces where the reader is an admin. A subject ending in `*` is a
    prefix. Downloads are listed only if `act` names them: they are many."""

    visible: Callable[[InstrumentedAttribute[Any]], ColumnElement[bool]] = lambda _namespace: true()
    namespace: str | None = None
    subject: str | None = None
    actor: str | None = None
    act: str | None = None
    since: datetime | None = None
    until: datetime | None = None


def list_oldest_first(session: Session, query: EventQuery, *, after: int = 0, limit: int = 100) -> list[AuditRow]:
    """Rows, oldest first; `after` is the id of the last row seen."""
    statement = select(AuditRow).where(AuditRow.id > after).order_by(AuditRow.id).limit(limit)
    return list(session.scalars(_filtered(statement, query)))


def list_newest_first(session: Session, query: EventQuery, *, before: int = 0, limit: int = 100) -> list[AuditRow]:
    """Rows, newest first; `before` is the id of the last row seen, 0 for none."""
    statement = select(AuditRow).order_by(AuditRow.id.desc()).limit(limit)
    if before:
        statement = statement.where(AuditRow.id < before)
    return list(session.scalars(_filtered(statement, query)))


def _filtered(statement: Select[AuditRow], query: EventQuery) -> Select[AuditRow]:
    statement = statement.where(query.visible(AuditRow.namespace))
    if query.subject and query.subject.endswith("*"):
        beginning = query.subject.removesuffix("*")
        statement = statement.where(AuditRow.subject.startswith(beginning, autoescape=True))
    elif query.subject:
        statement = statement.where(AuditRow.subject == query.subject)
    for column, value in (
        (AuditRow.namespace, query.namespace),
        (AuditRow.actor, query.actor),
        (AuditRow.act, query.act),
    ):
        if value is not None:
            statement = statement.where(column == value)
    if query.act is None:
        statement = statement.where(AuditRow.act != Act.RELEASE_DOWNLOAD)
    if query.since is not None:
        statement = statement.where(AuditRow.at >= query.since)
    if query.until is not None:
        statement = statement.where(AuditRow.at < query.until)
    return statement


def delete_downloads(session: Session, before: datetime) -> int:
    """Deletes the rows of downloads from before a time, which are not sealed. Returns how many."""
    old = delete(AuditRow).where(AuditRow.act == Act.RELEASE_DOWNLOAD, AuditRow.at < before).returning(AuditRow.id)
    return len(session.execute(old, execution_options={"synchronize_session": False}).all())


# Limits the audit rows for refusals of unauthenticated callers, who can cause any number of them.

MAX_REFUSALS = 60
"""Audit rows per minute, of one kind and in one process."""
_MINUTE_S = 60


@dataclass(slots=True)
class RefusalBudget:
    """The rows written in the last minute."""

    _recorded: deque[float] = field(default_factory=deque[float])
    _lock: Lock = field(default_factory=Lock)

    def spend(self) -> bool:
        """Whether one more row may be written; counts it if so."""
        now = time.monotonic()
        with self._lock:
            while self._recorded and now - self._recorded[0] >= _MINUTE_S:
                self._recorded.popleft()
            if len(self._recorded) >= MAX_REFUSALS:
                return False
            self._recorded.append(now)
            return True
