"""Keys of workers. A worker registers the public half of its key; registry admins revoke it."""

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from registry.database.engine import insert_if_absent
from registry.database.tables import Attestation, Release, Score, WorkerKey
from registry.database.tables.catalog import new_stamp
from registry.domain.access import audit
from registry.domain.access.audit import Act, Actor
from registry.errors import NotFound, Refused
from registry.formats.attestations import key_id


def register(session: Session, worker: str, public_key: str, actor: Actor) -> WorkerKey:
    """Registers a key, once. Raises Refused for a revoked one: what its worker measures must not count."""
    identity = key_id(public_key)
    values = {"worker": worker, "public_key": public_key, "created_at": actor.at}
    if insert_if_absent(session, WorkerKey, id=identity, **values):
        audit.record(session, actor, Act.WORKER_REGISTER, f"worker/{worker}", namespace=None, after={"key": identity})
    row = session.get_one(WorkerKey, identity)
    if row.revoked_at is not None:
        raise Refused(
            "worker_key_revoked",
            f"The key {identity[:12]} of the worker {row.worker} was revoked by {row.revoked_by}.",
            subject=identity[:12],
        )
    return row


def list_page(session: Session, *, after: str, limit: int) -> list[WorkerKey]:
    """A page of keys by id, revoked ones included."""
    return list(session.scalars(select(WorkerKey).where(WorkerKey.id > after).order_by(WorkerKey.id).limit(limit)))


def revoke(session: Session, actor: Actor, identity: str) -> WorkerKey:
    """Revokes a key, by its id or the first digits of it. What it signed counts as stated from then on. Raises NotFound
    for none, or several."""
    begins = WorkerKey.id.startswith(identity, autoescape=True)
    rows = session.scalars(select(WorkerKey).where(begins).limit(2).with_for_update()).all()
    if len(rows) != 1:
        raise NotFound("worker_key_unknown", f"No worker has the key {identity[:64]}.", subject=identity[:64])
    [row] = rows
    if row.revoked_at is None:
        row.revoked_at, row.revoked_by = actor.at, actor.name
        measured = select(Score.release_id).join(Attestation, Attestation.id == Score.attestation_id)
        measured = measured.where(Attestation.key_id == row.id)
        session.execute(update(Release).where(Release.id.in_(measured)).values(stamp=new_stamp()))
        session.flush()
        before = {"key": row.id}
        audit.record(session, actor, Act.WORKER_REVOKE, f"worker/{row.worker}", namespace=None, before=before)
    return row
