"""Retention: finished jobs are removed after a time, unless something that stays refers to them."""

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import Select, delete, exists, select
from sqlalchemy.orm import Session

from registry.database.tables import Composition, ConflictCheck, Evaluation, Job, Promotion, ReleaseInput
from registry.domain.access import audit
from registry.domain.access.audit import Act, Actor
from registry.domain.jobs.queue import FINISHED


def expired(ended_before: datetime) -> Select[int]:
    """The jobs that ended before then, except those that a release was composed by (its lineage), that a promotion
    waited for, or whose conflict report is kept."""
    made = exists().where(ReleaseInput.composition_id == Composition.id, Composition.job_id == Job.id)
    awaited = exists().where(Promotion.job_id == Job.id)
    checked = exists().where(ConflictCheck.job_id == Job.id)
    return select(Job.id).where(Job.state.in_(FINISHED), Job.finished_at < ended_before, ~made, ~awaited, ~checked)


def forget(session: Session, operator: Actor, ended_before: datetime, limit: int) -> int:
    """Removes some expired jobs with their compositions and evaluations, and returns their number. The audit log keeps
    their acts, and releases keep the scores that they measured."""
    query = select(Job).where(Job.id.in_(expired(ended_before).limit(limit))).with_for_update(skip_locked=True)
    jobs: Sequence[Job] = list(session.scalars(query))
    ids = [job.id for job in jobs]
    for table in (Composition, Evaluation):
        session.execute(delete(table).where(table.job_id.in_(ids)))
    for job in jobs:
        was = {"kind": job.kind, "state": job.state, "created_by": job.created_by}
        audit.record(session, operator, Act.JOB_EXPIRE, f"job/{job.id}", namespace=job.namespace, before=was)
    session.execute(delete(Job).where(Job.id.in_(ids)))
    return len(ids)
