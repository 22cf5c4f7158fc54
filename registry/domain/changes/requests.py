"""Changes that wait for a second admin: requested, approved, cancelled, and expired."""

from dataclasses import replace
from datetime import datetime, timedelta

from pydantic import TypeAdapter
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from registry.database.tables import ChangeRequest
from registry.domain.access import audit, namespaces, tokens
from registry.domain.access.audit import Act, Actor
from registry.domain.access.roles import Role, holds
from registry.domain.changes import kinds
from registry.domain.channels import withdrawals
from registry.errors import Conflict, NotAllowed, NotFound, Refused, RegistryError, Stale, Unavailable
from registry.wire.changes import Change

PENDING = "pending"
WAITS = timedelta(hours=72)
"""As a promotion waits by default."""
MAX_PENDING = 100
"""Pending requests of a namespace."""
_CHANGE: TypeAdapter[Change] = TypeAdapter(Change)


def change_of(row: ChangeRequest) -> Change:
    """The change that was requested."""
    return _CHANGE.validate_python(row.change)


def state_of(row: ChangeRequest, now: datetime) -> str:
    """Its state; one whose time is up is expired before the next sweep says so."""
    return "expired" if row.state == PENDING and row.expires_at <= now else row.state


def find(session: Session, namespace: str, request_id: int) -> ChangeRequest:
    """The request of that namespace. Raises NotFound."""
    row = session.get(ChangeRequest, request_id)
    if row is None or row.namespace != namespace:
        raise NotFound("change_unknown", f"{namespace} has no change {request_id}.", subject=namespace)
    return row


def list_page(session: Session, namespace: str, *, before: int, limit: int) -> list[ChangeRequest]:
    """The namespace's requests, newest first."""
    query = select(ChangeRequest).where(ChangeRequest.namespace == namespace)
    if before:
        query = query.where(ChangeRequest.id < before)
    return list(session.scalars(query.order_by(ChangeRequest.id.desc()).limit(limit)))


def request(session: Session, actor: Actor, namespace: str, change: Change) -> ChangeRequest:
    """Requests a change, after a trial that is undone. Raises what making it raises, and Refused if the namespace
    requires no second admin or has MAX_PENDING requests."""
    row = namespaces.find(session, namespace)
    if row.changes != "two":
        raise Refused(
            "second_admin_not_needed",
            f"{namespace} requires no second admin.",
            subject=namespace,
        )
    _refuse_full(session, namespace, actor.at)

    def attempt() -> dict[str, object]:
        kinds.apply(session, replace(actor, seconded_by=actor.name), namespace, change)
        return kinds.replaced(session, namespace, change)

    before = kinds.replaced(session, namespace, change)
    after = withdrawals.preview(session, attempt)
    made = ChangeRequest(
        namespace=namespace,
        change=change.model_dump(mode="json"),
        before=before,
        after=after,
        state=PENDING,
        actor=actor.name,
        token_id=actor.token_id,
        source=actor.source,
        created_at=actor.at,
        expires_at=actor.at + WAITS,
    )
    session.add(made)
    session.flush()
    summary = kinds.summary(namespace, change)
    audit.record(
        session,
        actor,
        Act.CHANGE_REQUEST,
        _subject(made),
        namespace=namespace,
        after={"state": PENDING, "summary": summary},
        change=made.change,
    )
    return made


def make_or_request(session: Session, actor: Actor, namespace: str, change: Change) -> ChangeRequest | None:
    """Makes the change or, where the namespace needs a second admin for it, requests it and returns the request."""
    try:
        with session.begin_nested():
            kinds.apply(session, actor, namespace, change)
    except Refused as error:
        if error.code != "second_admin_needed":
            raise
        return request(session, actor, namespace, change)
    return None


def approve(session: Session, actor: Actor, row: ChangeRequest) -> ChangeRequest:
    """Makes the change with the rights that its requester has now. An error ends the request. Raises NotAllowed for
    one's own request, and Conflict for one that no longer waits."""
    _lock_pending(session, row, actor.at)
    if row.actor == actor.name:
        raise NotAllowed("own_change", f"{actor.name} requested this change.", subject=_subject(row))
    requester = tokens.actor_now(session, row.actor, row.token_id, row.source, actor.at)
    try:
        _refuse_without_role(requester, row)
        _refuse_difference(row, row.before, kinds.replaced(session, row.namespace, change_of(row)))
        with session.begin_nested():
            kinds.apply(session, replace(requester, seconded_by=actor.name), row.namespace, change_of(row))
            _refuse_difference(row, row.after, kinds.replaced(session, row.namespace, change_of(row)))
    except Unavailable:
        raise
    except RegistryError as error:
        _end(session, actor, row, "conflict" if isinstance(error, Stale) else "refused", error)
    else:
        _end(session, actor, row, "applied")
    return row


def cancel(session: Session, actor: Actor, row: ChangeRequest) -> ChangeRequest:
    """Ends a request without effect: any admin of the namespace may. Raises Conflict for one that no longer waits."""
    _lock_pending(session, row, actor.at)
    _end(session, actor, row, "cancelled")
    return row


def expire(session: Session, actor: Actor) -> int:
    """Ends the requests whose time is up, and returns their number."""
    due = (ChangeRequest.state == PENDING, ChangeRequest.expires_at <= actor.at)
    rows = session.scalars(select(ChangeRequest).where(*due).order_by(ChangeRequest.id).with_for_update()).all()
    for row in rows:
        _end(session, actor, row, "expired")
    return len(rows)


def _subject(row: ChangeRequest) -> str:
    return f"{row.namespace}/changes/{row.id}"


def _lock_pending(session: Session, row: ChangeRequest, now: datetime) -> None:
    """Locks all pending requests of the namespace: each is approved on what the one before it left."""
    query = select(ChangeRequest).where(ChangeRequest.namespace == row.namespace, ChangeRequest.state == PENDING)
    ordered = query.order_by(ChangeRequest.id).with_for_update().execution_options(populate_existing=True)
    session.scalars(ordered).all()
    session.refresh(row)
    state = state_of(row, now)
    if state != PENDING:
        subject = _subject(row)
        raise Conflict("change_ended", f"Change {row.id} of {row.namespace} is already {state}.", subject=subject)


def _refuse_full(session: Session, namespace: str, now: datetime) -> None:
    waiting = select(func.count()).where(
        ChangeRequest.namespace == namespace, ChangeRequest.state == PENDING, ChangeRequest.expires_at > now
    )
    if (session.scalar(waiting) or 0) >= MAX_PENDING:
        raise Refused("too_many_changes", f"{MAX_PENDING} changes of {namespace} wait already.", subject=namespace)


def _refuse_without_role(requester: Actor, row: ChangeRequest) -> None:
    if not holds(requester, Role.ADMIN, row.namespace):
        raise NotAllowed(
            "role_lost",
            f"{row.actor} requested it with a token that no longer has the role {Role.ADMIN} in {row.namespace}.",
            subject=row.namespace,
            next_step="Request it again with a token that has the role.",
        )


def _refuse_difference(row: ChangeRequest, requested: dict[str, object], now: dict[str, object]) -> None:
    if requested != now:
        raise Stale(
            "change_outdated",
            f"What change {row.id} of {row.namespace} replaces is no longer what it was when {row.actor} requested it.",
            subject=_subject(row),
        )


def _end(session: Session, actor: Actor, row: ChangeRequest, state: str, error: RegistryError | None = None) -> None:
    row.state, row.ended_at, row.ended_by = state, actor.at, None if state == "expired" else actor.name
    row.error = None if error is None else error.to_row()
    session.flush()
    audit.record(
        session,
        actor,
        Act.CHANGE_END,
        _subject(row),
        namespace=row.namespace,
        before={"state": PENDING},
        after={"state": state, "summary": kinds.summary(row.namespace, change_of(row))},
        requested_by=row.actor,
        error=row.error,
    )
