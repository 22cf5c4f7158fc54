"""Webhooks: receivers of events, what they are owed, and nodes that an event has reported."""

from datetime import datetime

from sqlalchemy import JSON, BigInteger, ForeignKey, Index, String, text
from sqlalchemy.orm import Mapped, mapped_column

from registry.database.engine import Row, UtcDateTime
from registry.database.tables.catalog import Id


class Webhook(Row):
    """A receiver of events of one namespace, or of all with None, and perhaps only of one `repository`
    (NAMESPACE/NAME)."""

    __tablename__ = "webhooks"

    id: Mapped[str] = mapped_column(String(16), primary_key=True)
    namespace: Mapped[str | None] = mapped_column(String(64), index=True)
    repository: Mapped[str | None] = mapped_column(String(130))
    url: Mapped[str] = mapped_column(String(500))
    format: Mapped[str] = mapped_column(String(16))
    events: Mapped[list[str]] = mapped_column(JSON)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    created_by: Mapped[str] = mapped_column(String(128))


class WebhookSecret(Row):
    """A secret that signs what a webhook gets, as it is: a signature needs it. The newest one has no end; rotation
    gives one to the others. Backups leave the table out."""

    __tablename__ = "webhook_secrets"

    id: Mapped[int] = mapped_column(Id, primary_key=True)
    webhook_id: Mapped[str] = mapped_column(ForeignKey("webhooks.id", ondelete="CASCADE"), index=True)
    secret: Mapped[str] = mapped_column(String(100))
    until: Mapped[datetime | None] = mapped_column(UtcDateTime)


class WebhookDelivery(Row):
    """An event that a webhook is owed: the audit row `audit_id`, added in its transaction. `due_at` is when a worker
    tries next, None once it has ended; while a worker tries, that is when another one may. Deliveries of one webhook
    with the same `ordered_by`, a repository or a job, go out one after the other.

    `webhook_id` is not a foreign key: a webhook that is removed meanwhile must not fail the change that is announced.
    """

    __tablename__ = "webhook_deliveries"
    __table_args__ = (
        Index("ix_webhook_deliveries_webhook", "webhook_id", "id"),
        # The migration gives PostgreSQL the same condition, as for suites.
        Index("ix_webhook_deliveries_open", "webhook_id", "ordered_by", "id", sqlite_where=text("due_at IS NOT NULL")),
        Index("ix_webhook_deliveries_state", "state", "created_at"),
    )

    id: Mapped[int] = mapped_column(Id, primary_key=True)
    webhook_id: Mapped[str] = mapped_column(String(16))
    audit_id: Mapped[int] = mapped_column(BigInteger)
    event: Mapped[str] = mapped_column(String(40))
    ordered_by: Mapped[str] = mapped_column(String(130))
    state: Mapped[str] = mapped_column(String(16))
    attempts: Mapped[int]
    due_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    status: Mapped[int | None]
    error: Mapped[str | None] = mapped_column(String(200))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    tried_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class FleetDrift(Row):
    """A channel of a node that is not in step, since `since`. `reported` says whether an event has announced it."""

    __tablename__ = "fleet_drifts"

    node_id: Mapped[int] = mapped_column(ForeignKey("fleet_nodes.id", ondelete="CASCADE"), primary_key=True)
    repository: Mapped[str] = mapped_column(String(64), primary_key=True)
    channel: Mapped[str] = mapped_column(String(64), primary_key=True)
    since: Mapped[datetime] = mapped_column(UtcDateTime)
    reported: Mapped[bool]
