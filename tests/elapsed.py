"""Lets time pass in a registry without waiting: shifts times of the database's clock into the past."""

from datetime import timedelta

from sqlalchemy import select, update

from registry.database.tables import Job, WebhookDelivery, WorkerRow
from registry.transfer.resources import Resources


def let_elapse(resources: Resources, by: timedelta) -> None:
    """Jobs were created, and workers seen, that much earlier; pauses and leases are that much shorter."""
    with resources.write() as session:
        for job in session.scalars(select(Job)):
            job.created_at -= by
            job.heartbeat_at = job.heartbeat_at and job.heartbeat_at - by
        for name, seen_at in session.execute(select(WorkerRow.name, WorkerRow.seen_at)).all():
            session.execute(update(WorkerRow).where(WorkerRow.name == name).values(seen_at=seen_at - by))


def let_deliveries_elapse(resources: Resources, by: timedelta) -> None:
    """Pauses before the next attempts, and leases of attempts under way, are that much shorter."""
    with resources.write() as session:
        for row in session.scalars(select(WebhookDelivery).where(WebhookDelivery.due_at.is_not(None))):
            row.due_at = row.due_at and row.due_at - by
