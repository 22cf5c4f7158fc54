"""Conflict checks: the report from the weights of some adapters, computed by a worker and kept for their readers.

A check is identified by what its report depends on: the adapters' releases, their weights, the method, its settings and
this version of Adaptory. A repeated request gets the kept one.
"""

import hashlib
from collections.abc import Collection, Mapping
from datetime import datetime, timedelta
from importlib.metadata import version
from typing import Any

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from composer.formats.recipes.lock import Lock
from registry.database.engine import insert_if_absent
from registry.database.tables import ConflictCheck, Job
from registry.domain.access.audit import Actor
from registry.domain.access.roles import EVERYWHERE, Role, holds, may_read, refuse_anonymous
from registry.domain.jobs import queue
from registry.domain.jobs.needs import WorkerNeeds
from registry.errors import NotFound
from registry.formats.references import parse_reference

KIND = "conflicts"
STEPS = ("check",)
KEPT = timedelta(days=30)
"""How long a check is kept after it has ended."""
ANEW = ("failed", "cancelled")
"""States of a job after which the next request computes the check again."""


def key_of(lock: Lock) -> str:
    """The key of the check of these locked inputs with this method."""
    return hashlib.sha256(f"{version('adaptory')} {lock.digest}".encode()).hexdigest()


def find_last(session: Session, lock: Lock) -> ConflictCheck | None:
    """The latest check of these inputs, also one that failed; None if there is none."""
    with_job = (ConflictCheck.key == key_of(lock)) & ConflictCheck.job_id.is_not(None)
    return session.scalar(select(ConflictCheck).where(with_job))


def request(session: Session, actor: Actor, lock: Lock) -> ConflictCheck:
    """The kept check, computed or under way, or a new one, which waits for a worker. Raises Unauthenticated for a new
    one without a token, TooMany as `queue.enqueue`."""
    kept = find_last(session, lock)
    if kept is not None and not _must_begin(session, kept):
        return kept
    refuse_anonymous(actor)
    key = key_of(lock)
    insert_if_absent(session, ConflictCheck, key=key, lock=lock.to_json(), job_id=None, report=None)
    locked = select(ConflictCheck).where(ConflictCheck.key == key).with_for_update()
    check = session.scalars(locked.execution_options(populate_existing=True)).one()
    if _must_begin(session, check):  # else another request has begun it
        namespaces = namespaces_of(check)
        owner = next(iter(namespaces)) if len(namespaces) == 1 else None
        job = queue.enqueue(session, actor, KIND, STEPS, owner)
        queue.declare(session, job, WorkerNeeds())
        check.job_id, check.report = job.id, None
        session.flush()
    return check


def _must_begin(session: Session, check: ConflictCheck) -> bool:
    return check.job_id is None or queue.find(session, check.job_id).state in ANEW


def find(session: Session, actor: Actor, check_id: int) -> ConflictCheck:
    """The check. Raises NotFound unless the actor may read all of its adapters."""
    check = session.get(ConflictCheck, check_id)
    if check is None or not may_look(actor, check):
        raise NotFound("conflicts_unknown", f"Conflict check {check_id} does not exist.", subject=str(check_id))
    return check


def may_look(actor: Actor, check: ConflictCheck) -> bool:
    """Whether the actor may read all adapters: the report has their names and compares their weights."""
    return all(may_read(actor, namespace) for namespace in namespaces_of(check))


def namespaces_of(check: ConflictCheck) -> set[str]:
    return {parse_reference(row["repository"]).repository.namespace for row in check.lock["inputs"]}


def permit_job(session: Session, actor: Actor, job: Job) -> None:
    """Raises NotFound unless the actor requested the job or is a publisher of its namespace, and may read all adapters.
    A job whose check another job has replaced is not shown either."""
    check = find_by_job(session, job.id)
    own = job.created_by == actor.name or holds(actor, Role.PUBLISHER, job.namespace or EVERYWHERE)
    if check is None or not own or not may_look(actor, check):
        raise queue.unknown(job.id)


def readable_jobs(session: Session, actor: Actor, job_ids: Collection[int]) -> set[int]:
    """Those of the jobs that are of checks whose adapters the actor may read."""
    checks = session.scalars(select(ConflictCheck).where(ConflictCheck.job_id.in_(job_ids)))
    return {check.job_id for check in checks if check.job_id is not None and may_look(actor, check)}


def find_by_job(session: Session, job_id: int) -> ConflictCheck | None:
    """The check that the job computes; None if another job has replaced it, or if it is kept no longer."""
    return session.scalar(select(ConflictCheck).where(ConflictCheck.job_id == job_id))


def keep(session: Session, job_id: int, report: Mapping[str, Any]) -> None:
    """Keeps the report, unless another job has replaced this one."""
    session.execute(update(ConflictCheck).where(ConflictCheck.job_id == job_id).values(report=report))


def expire(session: Session, now: datetime) -> None:
    """Deletes the checks that ended KEPT ago."""
    ended = select(Job.id).where(Job.kind == KIND, Job.finished_at < now - KEPT)
    session.execute(delete(ConflictCheck).where(ConflictCheck.job_id.in_(ended)))
