"""Deliveries: what webhooks are owed, in order, at least once.

A worker claims a delivery by setting `due_at` to the end of its lease. If the worker dies, another one tries again
then. A delivery is due only if no earlier one of its webhook with the same `ordered_by` is unfinished.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, and_, delete, exists, func, or_, select, update
from sqlalchemy.orm import Session, aliased

from registry.database.tables import AuditRow, Webhook, WebhookDelivery, WebhookSecret
from registry.domain.access import audit
from registry.domain.access.audit import Act, Actor
from registry.domain.access.outbox import AT_ONCE, PENDING
from registry.domain.webhooks import hooks
from registry.errors import NotFound
from registry.formats.webhooks import PAUSES, Event

FAILED, DELIVERED, DEAD = "failed", "delivered", "dead"
"""`failed`: the last attempt failed, and another one follows."""
STATES: tuple[str, ...] = (PENDING, FAILED, DELIVERED, DEAD)
LEASE = timedelta(seconds=60)
"""How long a worker may take for one attempt, whose own limit is 10 s."""
KEPT = timedelta(days=30)
"""How long a delivery that has ended stays."""
_MAX_ERROR = 200
_BATCH = 100
_UNTRACKED = {"synchronize_session": False}


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A claimed delivery. `secrets` are those in force, newest first; no log shows them or the address."""

    id: int
    attempt: int
    webhook_id: str
    url: str = field(repr=False)
    format: str
    secrets: Sequence[str] = field(repr=False)
    event: Event


@dataclass(frozen=True, slots=True)
class DeliveryOutcome:
    """The outcome of an attempt: the status of the answer, or the reason why there was none."""

    status: int | None
    error: str | None = None

    @property
    def is_delivered(self) -> bool:
        return self.status is not None and 200 <= self.status < 300


def _due(now: datetime) -> ColumnElement[bool]:
    """Whether a delivery may go out: it is due, its webhook exists and has a secret, and no earlier one is
    unfinished."""
    earlier = aliased(WebhookDelivery)
    blocked = exists().where(
        earlier.webhook_id == WebhookDelivery.webhook_id,
        earlier.ordered_by == WebhookDelivery.ordered_by,
        earlier.id < WebhookDelivery.id,
        earlier.due_at.is_not(None),
    )
    signed = exists().where(WebhookSecret.webhook_id == WebhookDelivery.webhook_id)
    return and_(WebhookDelivery.due_at <= now, signed, ~blocked)


def due(session: Session, now: datetime, most: int, left: Mapping[str, int]) -> list[tuple[int, str]]:
    """Deliveries that may go out, each with its webhook: at most `most` of a webhook, or as many as are `left`."""
    order = (WebhookDelivery.due_at, WebhookDelivery.id)
    place = func.row_number().over(partition_by=WebhookDelivery.webhook_id, order_by=order)
    full = [webhook_id for webhook_id, count in left.items() if count <= 0]
    heads = select(WebhookDelivery.id, WebhookDelivery.webhook_id, WebhookDelivery.due_at, place.label("place"))
    heads = heads.where(_due(now), WebhookDelivery.webhook_id.not_in(full)).subquery()
    query = select(heads.c.id, heads.c.webhook_id, heads.c.place).where(heads.c.place <= most)
    rows = session.execute(query.order_by(heads.c.place, heads.c.due_at).limit(_BATCH))
    return [(row.id, row.webhook_id) for row in rows if row.place <= left.get(row.webhook_id, most)]


def claim(session: Session, ids: Sequence[int], now: datetime) -> list[Outgoing]:
    """Claims those that are still due and that no other worker has."""
    free = select(WebhookDelivery).where(WebhookDelivery.id.in_(ids), _due(now))
    free = free.with_for_update(skip_locked=True, of=WebhookDelivery).execution_options(populate_existing=True)
    claimed: list[Outgoing] = []
    for row in session.scalars(free):
        hook, recorded = session.get(Webhook, row.webhook_id), session.get(AuditRow, row.audit_id)
        if hook is None or recorded is None:
            continue
        row.attempts, row.tried_at, row.due_at = row.attempts + 1, now, now + LEASE
        claimed.append(_outgoing(session, row, hook, recorded, now))
    session.flush()
    return claimed


def _outgoing(session: Session, row: WebhookDelivery, hook: Webhook, recorded: AuditRow, now: datetime) -> Outgoing:
    in_force = or_(WebhookSecret.until.is_(None), WebhookSecret.until > now)
    query = select(WebhookSecret.secret).where(WebhookSecret.webhook_id == hook.id, in_force)
    event = Event(
        recorded.id,
        row.event,
        recorded.subject,
        recorded.at,
        recorded.namespace,
        recorded.act,
        recorded.actor,
        recorded.reason,
        recorded.before,
        recorded.after,
        recorded.detail,
    )
    secrets = session.scalars(query.order_by(WebhookSecret.id.desc())).all()
    return Outgoing(row.id, row.attempts, hook.id, hook.url, hook.format, secrets, event)


def finish(session: Session, sent: Outgoing, outcome: DeliveryOutcome, now: datetime) -> str | None:
    """Records what came of an attempt, and returns the state; None if the delivery was claimed or replayed again
    meanwhile."""
    own = (WebhookDelivery.id == sent.id, WebhookDelivery.attempts == sent.attempt, WebhookDelivery.due_at.is_not(None))
    state, due_at = DELIVERED, None
    if not outcome.is_delivered:
        due_at = now + PAUSES[sent.attempt - 1] if sent.attempt <= len(PAUSES) else None
        state = FAILED if due_at else DEAD
    error = (outcome.error or "")[:_MAX_ERROR] or None
    values = {"state": state, "due_at": due_at, "status": outcome.status, "error": error}
    done = update(WebhookDelivery).where(*own).values(values).returning(WebhookDelivery.id)
    return state if session.scalar(done, execution_options=_UNTRACKED) is not None else None


def list_page(
    session: Session, actor: Actor, webhook_id: str, *, state: str | None, before: int, limit: int
) -> list[WebhookDelivery]:
    """Deliveries of a webhook that the actor administers, newest first."""
    hook = hooks.find(session, actor, webhook_id)
    query = select(WebhookDelivery).where(WebhookDelivery.webhook_id == hook.id)
    if before:
        query = query.where(WebhookDelivery.id < before)
    if state is not None:
        query = query.where(WebhookDelivery.state == state)
    return list(session.scalars(query.order_by(WebhookDelivery.id.desc()).limit(limit)))


def replay(session: Session, actor: Actor, webhook_id: str, delivery_id: int | None) -> list[WebhookDelivery]:
    """Delivers again, from the first attempt: one delivery, or with None all dead ones. Returns them."""
    hook = hooks.find(session, actor, webhook_id)
    own = select(WebhookDelivery).where(WebhookDelivery.webhook_id == hook.id).with_for_update()
    chosen = WebhookDelivery.state == DEAD if delivery_id is None else WebhookDelivery.id == delivery_id
    rows = list(session.scalars(own.where(chosen).order_by(WebhookDelivery.id)))
    if delivery_id is not None and not rows:
        raise NotFound("delivery_unknown", f"Webhook {hook.id} has no delivery {delivery_id}.", subject=hook.id)
    for row in rows:
        row.state, row.attempts, row.due_at, row.status, row.error = PENDING, 0, AT_ONCE, None, None
    session.flush()
    if rows:
        detail: dict[str, Any] = {"deliveries": [row.id for row in rows[:100]], "count": len(rows)}
        audit.record(session, actor, Act.WEBHOOK_REPLAY, f"webhook/{hook.id}", namespace=hook.namespace, **detail)
    return rows


def last_of(session: Session, webhook_ids: Collection[str], limit: int) -> Mapping[str, list[WebhookDelivery]]:
    """The newest deliveries of each webhook, newest first."""
    place = func.row_number().over(partition_by=WebhookDelivery.webhook_id, order_by=WebhookDelivery.id.desc())
    ranked = select(WebhookDelivery.id, place.label("place")).where(WebhookDelivery.webhook_id.in_(webhook_ids))
    newest = ranked.subquery()
    query = select(WebhookDelivery).join(newest, newest.c.id == WebhookDelivery.id).where(newest.c.place <= limit)
    last: dict[str, list[WebhookDelivery]] = {webhook_id: [] for webhook_id in webhook_ids}
    for row in session.scalars(query.order_by(WebhookDelivery.id.desc())):
        last[row.webhook_id].append(row)
    return last


def counts(session: Session) -> tuple[dict[str, int], datetime | None]:
    """The number of deliveries by state, and when the oldest unfinished one was added."""
    rows = session.execute(select(WebhookDelivery.state, func.count()).group_by(WebhookDelivery.state))
    by_state = dict.fromkeys(STATES, 0) | {state: count for state, count in rows}  # noqa: C416
    unfinished = WebhookDelivery.state.in_((PENDING, FAILED))
    return by_state, session.scalar(select(func.min(WebhookDelivery.created_at)).where(unfinished))


def forget(session: Session, now: datetime) -> None:
    """Removes deliveries that ended long ago, and those of webhooks that were removed while one was added."""
    ended = and_(WebhookDelivery.due_at.is_(None), WebhookDelivery.created_at < now - KEPT)
    orphaned = ~exists().where(Webhook.id == WebhookDelivery.webhook_id)
    session.execute(delete(WebhookDelivery).where(or_(ended, orphaned)), execution_options=_UNTRACKED)
    session.execute(delete(WebhookSecret).where(WebhookSecret.until < now), execution_options=_UNTRACKED)
