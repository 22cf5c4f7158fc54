"""Idempotency keys: a repeated request takes effect once and returns the stored result."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import delete, update
from sqlalchemy.orm import Session

from registry.database.engine import insert_if_absent
from registry.database.tables import KeptAnswer
from registry.errors import Conflict

KEPT = timedelta(days=7)
Answer = dict[str, Any]


@dataclass(frozen=True, slots=True)
class IdempotentRequest:
    """A request under its user's key; `request` is the sha256 of its content."""

    user: str
    key: str
    request: str


def find_answer(session: Session, keyed: IdempotentRequest) -> Answer | None:
    """The stored result of an earlier request. Raises Conflict if the key belongs to another request."""
    kept = session.get(KeptAnswer, (keyed.user, keyed.key))
    if kept is None:
        return None
    if kept.request != keyed.request:
        raise Conflict(
            "key_reused",
            f"The Idempotency-Key {keyed.key} was used for another request.",
            subject=keyed.key,
            next_step="Use a new key for each request.",
        )
    return kept.answer


def claim_key(session: Session, keyed: IdempotentRequest | None, at: datetime) -> Answer | None:
    """Like `find_answer`. If that is None, claims the key: this transaction then performs the request and calls
    `store_answer`. A concurrent duplicate waits, and performs the request itself if this transaction fails."""
    if keyed is None:
        return None
    named = {"user": keyed.user, "key": keyed.key, "request": keyed.request}
    return None if insert_if_absent(session, KeptAnswer, **named, answer={}, at=at) else find_answer(session, keyed)


def store_answer(session: Session, keyed: IdempotentRequest | None, answer: Mapping[str, Any]) -> None:
    """Stores the answer under the claimed key, if the request has one."""
    if keyed is not None:
        own = (KeptAnswer.user == keyed.user, KeptAnswer.key == keyed.key)
        session.execute(update(KeptAnswer).where(*own).values(answer=dict(answer)))


def expire_keys(session: Session, now: datetime) -> None:
    """Deletes the keys older than KEPT, with their answers."""
    session.execute(delete(KeptAnswer).where(KeptAnswer.at < now - KEPT))
