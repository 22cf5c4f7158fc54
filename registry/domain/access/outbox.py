"""The outbox: which audit rows are events, and the webhooks that are owed them.

`announce` runs in the transaction that records the audit row. So nothing is announced that did not commit, and a
webhook never misses a row whose id another transaction overtook.
"""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, cast

from sqlalchemy import Table, bindparam, insert, or_, select
from sqlalchemy.orm import Session

from registry.database.tables import Webhook, WebhookDelivery
from registry.formats.webhooks import TEST

PENDING = "pending"
AT_ONCE = datetime(1970, 1, 1, tzinfo=UTC)
"""`due_at` of a delivery that was not tried yet: a server whose clock is ahead of the database's delays none."""
_EVENTS = {
    "release:publish": "release.published",
    "release:yank": "release.yanked",
    "release:unyank": "release.unyanked",
    "release:takedown": "release.taken_down",
    "channel:promote": "channel.moved",
    "channel:rollback": "channel.moved",
    "channel:yank": "channel.moved",
    "channel:unyank": "channel.moved",
    "channel:policy": "channel.moved",
    "channel:delete": "channel.moved",
    "promotion:request": "promotion.waiting",
    "promotion:approve": "promotion.approved",
    "promotion:end": "promotion.refused",
    "promotion:cancel": "promotion.refused",
    "change:request": "change.waiting",
    "change:end": "change.ended",
    "job:end": "job.ended",
    "fleet:drift": "fleet.drifted",
    "fleet:recover": "fleet.recovered",
}
_deliveries = cast(Table, WebhookDelivery.__table__)
_HOOKS = select(Webhook.id, Webhook.repository, Webhook.events).where(
    or_(Webhook.namespace.is_(None), Webhook.namespace == bindparam("of_namespace"))
)
"""The webhooks that see a namespace. Composed once, since every move reads them."""


def event_of(act: str, after: Mapping[str, Any] | None) -> str | None:
    """The event that an act is, None for most acts. A completed promotion is announced by its move, and a withdrawn
    approval is none."""
    if (act == "promotion:end" and (after or {}).get("state") == "completed") or (
        act == "promotion:approve" and after is None
    ):
        return None
    return _EVENTS.get(act)


def ordered_by(subject: str) -> str:
    """The repository of a release or a channel, else the subject: what deliveries are kept in order by."""
    return re.split("[:@]", subject, maxsplit=1)[0][:130]


def announce(session: Session, audit_id: int, event: str, subject: str, namespace: str | None, at: datetime) -> None:
    """Adds a delivery for each webhook that wants the event."""
    hooks = session.execute(_HOOKS, {"of_namespace": namespace}).all()
    key = ordered_by(subject)
    wanted = [id_ for id_, repository, events in hooks if event in events and repository in (None, key)]
    if wanted:
        session.execute(insert(_deliveries), [_owed(id_, audit_id, event, key, at) for id_ in wanted])


def announce_test(session: Session, audit_id: int, webhook_id: str, at: datetime) -> int:
    """Adds a delivery of a test, which waits for no other one, and returns its id."""
    values = _owed(webhook_id, audit_id, TEST, f"webhook/{webhook_id}/{audit_id}", at)
    return session.scalars(insert(_deliveries).returning(_deliveries.c.id), values).one()


def _owed(webhook_id: str, audit_id: int, event: str, key: str, at: datetime) -> dict[str, Any]:
    return {
        "webhook_id": webhook_id,
        "audit_id": audit_id,
        "event": event,
        "ordered_by": key,
        "state": PENDING,
        "attempts": 0,
        "due_at": AT_ONCE,
        "created_at": at,
    }
