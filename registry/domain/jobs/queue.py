"""The job queue in the database: enqueue, claim, record progress, cancel. Independent of what a job does.

queued -> running -> done | refused | failed | cancelled. A worker holds a running job while its heartbeat is fresh;
afterwards the job is stalled, and another worker takes over at the first unfinished step. A queued job with a heartbeat
in the future waits until then. Heartbeats, and each `now` that is compared with them, are times of `database_now`: a
worker whose clock is wrong neither claims another worker's job nor keeps its own for too long.

Among the jobs that a worker can run, those of the namespace with the fewest running jobs go first, then those of higher
priority, then the older ones. A job that has waited for OVERDUE goes before all others that have not, so only older
jobs go before it.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Select, and_, case, delete, exists, func, or_, select, update
from sqlalchemy.orm import Session, aliased

from registry.database.engine import database_now
from registry.database.tables import Composition, ConflictCheck, Evaluation, Job, Promotion, ReleaseInput
from registry.domain.access import audit
from registry.domain.access.audit import Act, Actor
from registry.domain.access.roles import EVERYWHERE, Reach, Role, permit
from registry.domain.jobs import needs
from registry.domain.jobs.needs import LEASE, Offer, WorkerNeeds
from registry.errors import Conflict, NotFound, RegistryError, TooMany
from registry.formats.priority import Priority

OVERDUE = timedelta(hours=6)
"""How long a job lets less busy namespaces and higher priorities go first."""
MAX_ATTEMPTS = 3
PAUSES = (timedelta(seconds=15), timedelta(minutes=5))
"""Before the second and third attempt of a job whose stores are unavailable: for a restart, and for a longer repair."""
MAX_QUEUED = 100
"""Maximum queued jobs per user."""
FINISHED = ("done", "refused", "failed", "cancelled")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """A caller's settings of a job: its priority, and the device memory that it needs, None for that of its bases."""

    priority: Priority = Priority.NORMAL
    memory_bytes: int | None = None


PLAIN = Wish()


def enqueue(
    session: Session,
    actor: Actor,
    kind: str,
    steps: Sequence[str],
    namespace: str | None,
    wish: Wish = PLAIN,
) -> Job:
    """Adds a job with these steps; `declare` declares its needs. Raises TooMany if the user has MAX_QUEUED jobs
    waiting, and NotAllowed for a high priority unless the user is a releaser of the namespace."""
    _refuse_high(actor, wish.priority, namespace)
    waiting = select(func.count()).select_from(Job).where(Job.state == "queued", Job.created_by == actor.name)
    if (session.scalar(waiting) or 0) >= MAX_QUEUED:
        raise TooMany("too_many_jobs", f"{MAX_QUEUED} jobs of {actor.name} are already queued.", subject=actor.name)
    job = Job(
        kind=kind,
        namespace=namespace,
        state="queued",
        steps=[{"name": step, "state": "waiting", "progress": 0.0} for step in steps],
        error=None,
        cancel_requested=False,
        worker=None,
        heartbeat_at=None,
        attempts=0,
        created_at=actor.at,
        created_by=actor.name,
        finished_at=None,
        priority=wish.priority.rank,
    )
    session.add(job)
    session.flush()
    return job


def _refuse_high(actor: Actor, priority: Priority, namespace: str | None) -> None:
    if priority is Priority.HIGH:
        permit(actor, Role.RELEASER, namespace or EVERYWHERE)


def declare(session: Session, job: Job, needed: WorkerNeeds, wish: Wish = PLAIN) -> None:
    """Declares the job's needs, with the requested memory instead of that of its bases."""
    if wish.memory_bytes is not None:
        needed = replace(needed, memory_bytes=wish.memory_bytes)
    needs.declare(session, job, needed)


def find(session: Session, job_id: int) -> Job:
    """The job. Raises NotFound."""
    job = session.get(Job, job_id)
    if job is None:
        raise unknown(job_id)
    return job


def find_all(session: Session, ids: Sequence[int]) -> Sequence[Job]:
    """The jobs with these ids, as far as they exist."""
    return session.scalars(select(Job).where(Job.id.in_(ids))).all()


def unknown(job_id: int) -> NotFound:
    """The error for a job that does not exist or that the actor may not see."""
    return NotFound("job_unknown", f"Job {job_id} does not exist.", subject=str(job_id))


def list_page(session: Session, reach: Reach, *, before: int, limit: int) -> list[Job]:
    """Jobs in reach, newest first."""
    query = select(Job).where(reach.within(Job.namespace)).order_by(Job.id.desc()).limit(limit)
    if before:
        query = query.where(Job.id < before)
    return list(session.scalars(query))


def stalled_since(job: Job, now: datetime) -> datetime | None:
    """When the lease of a running job's worker ran out; None while it lasts, and for jobs that are not running."""
    if job.state != "running" or job.heartbeat_at is None or job.heartbeat_at >= now - LEASE:
        return None
    return job.heartbeat_at + LEASE


def unfinished(session: Session) -> list[tuple[str, str, int, datetime]]:
    """Kind, state, number and oldest time of creation of the jobs that are queued, running or `stalled`: running, and
    their worker's lease has run out."""
    state = case((_stalled(database_now(session)), "stalled"), else_=Job.state).label("seen")
    query = select(Job.kind, state, func.count(), func.min(Job.created_at))
    query = query.where(Job.state.in_(("queued", "running"))).group_by(Job.kind, state).order_by(Job.kind, state)
    return [(kind, state, count, since) for kind, state, count, since in session.execute(query)]


def claim(
    session: Session,
    worker: str,
    now: datetime,
    kinds: Collection[str],
    offer: Offer | None = None,
    *,
    only: int | None = None,
) -> Job | None:
    """Claims the first job of these kinds that is due or whose worker fell silent, and whose needs the offer meets;
    without an offer, needs are ignored. A job that only has to be cancelled needs nothing. `only` is the one job that
    may be claimed.

    A job beyond `MAX_ATTEMPTS` has killed its workers: the caller must end it.
    """
    met = or_(needs.met_by(offer), Job.cancel_requested) if offer is not None else None
    named = None if only is None else Job.id == only
    free = and_(Job.kind.in_(kinds), _free(now), *(condition for condition in (met, named) if condition is not None))
    # Running jobs of each namespace; those of several namespaces count together.
    one = aliased(Job)
    namespace = func.coalesce(one.namespace, "")
    query = select(namespace.label("namespace"), func.count().label("count"))
    running = query.where(one.state == "running", one.heartbeat_at >= now - LEASE).group_by(namespace).subquery()
    first = select(Job.id).outerjoin(running, running.c.namespace == func.coalesce(Job.namespace, ""))
    first = first.where(free).order_by(*_order(now, func.coalesce(running.c.count, 0))).limit(1)
    taken = (
        update(Job)
        .where(Job.id == first.correlate(None).scalar_subquery(), free)
        .values(state="running", worker=worker, heartbeat_at=now, attempts=Job.attempts + 1, error=None)
    )
    row = session.execute(taken.returning(Job.id), execution_options={"synchronize_session": False}).first()
    return session.get(Job, row[0], populate_existing=True) if row else None


def _order(now: datetime, running: ColumnElement[int]) -> tuple[Any, ...]:
    """The order of jobs: the first goes first. `running` is the number of running jobs of its namespace."""
    overdue = Job.created_at < now - OVERDUE
    last = case((overdue, 0), else_=1)
    return last, case((overdue, 0), else_=running), case((overdue, 0), else_=-Job.priority), Job.id


def end_unmet(session: Session, now: datetime) -> list[tuple[int, RegistryError]]:
    """Ends some jobs that no worker has met for `needs.PATIENCE`; returns their numbers with the errors."""
    ended: list[tuple[int, RegistryError]] = []
    for job, error in needs.unmet(session, _free(now), now):
        state = "refused" if error.exit_code == 1 else "failed"
        still = update(Job).where(Job.id == job.id, _free(now))
        over = still.values(state=state, finished_at=now, error=error.to_row(), worker=None).returning(Job.id)
        if session.execute(over, execution_options={"synchronize_session": False}).first() is not None:
            _record_end(session, session.get_one(Job, job.id, populate_existing=True), now)
            ended.append((job.id, error))
    return ended


def _free(now: datetime) -> ColumnElement[bool]:
    """Whether a job is due, or its worker fell silent."""
    due = and_(Job.state == "queued", or_(Job.heartbeat_at.is_(None), Job.heartbeat_at <= now))
    return or_(due, _stalled(now))


def _stalled(now: datetime) -> ColumnElement[bool]:
    """Whether a job is running and the lease of its worker has run out."""
    return and_(Job.state == "running", Job.heartbeat_at < now - LEASE)


def extend_lease(session: Session, job_id: int, worker: str, now: datetime) -> bool:
    """Extends the worker's hold on the job. False if it was taken over or cancelled: the worker must stop."""
    held = update(Job).where(Job.id == job_id, Job.worker == worker, Job.state == "running")
    row = session.execute(
        held.values(heartbeat_at=now).returning(Job.cancel_requested), execution_options={"synchronize_session": False}
    ).first()
    return row is not None and not row[0]


LOG_LINES, LOG_CHARS = 200, 400
"""How much of a failed unit's log a step keeps: its last lines, each cut to this length."""


@dataclass(frozen=True, slots=True)
class Amount:
    """Progress of a step, in bytes, examples or units. `redone` of them were done again; `log` is the log of a failed
    unit."""

    done: int
    total: int
    unit: str
    redone: int = 0
    log: Sequence[str] = ()

    @property
    def share(self) -> float:
        return min(1.0, self.done / max(self.total, 1))

    def to_row(self) -> dict[str, Any]:
        """The document in the step's row, with the last lines of the log. Omits fields that are 0 or empty, since
        servers of the previous version do not know them."""
        row: dict[str, Any] = {"done": self.done, "total": self.total, "unit": self.unit}
        if self.redone:
            row["redone"] = self.redone
        if self.log:
            row["log"] = [line[:LOG_CHARS].replace("\0", "") for line in self.log[-LOG_LINES:]]
        return row


def note_step(session: Session, job_id: int, worker: str, step: str, *, state: str, progress: float | Amount) -> bool:
    """Records a step's state. Returns False and writes nothing if the job is no longer this worker's."""
    job = _locked(session, job_id)
    if job.worker != worker or job.state != "running":
        return False
    amount = progress.to_row() if isinstance(progress, Amount) else {}
    share = progress.share if isinstance(progress, Amount) else progress
    noted = {"state": state, "progress": round(share, 3), **amount}
    job.steps = [{**row, **noted} if row["name"] == step else row for row in job.steps]
    return True


def finish(
    session: Session, job_id: int, worker: str, state: str, now: datetime, error: dict[str, Any] | None = None
) -> bool:
    """Ends the job. Returns False, and changes nothing, if it is no longer this worker's."""
    held = update(Job).where(Job.id == job_id, Job.worker == worker, Job.state == "running")
    ended = held.values(state=state, finished_at=now, error=error, worker=None).returning(Job.id)
    if session.execute(ended, execution_options={"synchronize_session": False}).first() is None:
        return False
    _record_end(session, session.get_one(Job, job_id, populate_existing=True), now)
    return True


def _record_end(session: Session, job: Job, now: datetime) -> None:
    """Records that a job ended, by the user who began it: no other user has, and webhooks announce it. Only with the
    code of its error, since the text may name inputs from namespaces that admins of this one may not read."""
    after = {"state": job.state, "error": {"code": job.error.get("code")} if job.error else None}
    actor = Actor(job.created_by, now, {})
    audit.record(session, actor, Act.JOB_END, f"job/{job.id}", namespace=job.namespace, after=after, kind=job.kind)


def requeue(session: Session, job_id: int, worker: str) -> None:
    """Returns the job to the queue, for a worker that stops or lacks something local. Does not count an attempt."""
    held = update(Job).where(Job.id == job_id, Job.worker == worker, Job.state == "running")
    given = held.values(state="queued", worker=None, heartbeat_at=None, attempts=Job.attempts - 1)
    session.execute(given, execution_options={"synchronize_session": False})


def retry_later(session: Session, job_id: int, worker: str, until: datetime, error: dict[str, Any]) -> None:
    """Returns the job to the queue, to run after `until`, when the stores were unavailable; at once if it was cancelled
    meanwhile. Counts the attempt."""
    held = update(Job).where(Job.id == job_id, Job.worker == worker, Job.state == "running")
    due = case((Job.cancel_requested, None), else_=until)
    session.execute(held.values(state="queued", worker=None, heartbeat_at=due, error=error))


def request_cancel(session: Session, job_id: int, now: datetime) -> Job:
    """Cancels a job: immediately if no step has started, else when its worker next checks and cleans up."""
    job = _locked(session, job_id)
    _refuse_finished(job, "There is nothing to cancel.")
    job.cancel_requested = True
    if job.state == "queued":
        job.heartbeat_at = None
        if all(step["state"] == "waiting" for step in job.steps):
            job.state, job.finished_at = "cancelled", now
            _record_end(session, job, now)
    return job


def set_priority(session: Session, actor: Actor, job_id: int, priority: Priority) -> Job:
    """Gives an unfinished job another priority. Raises NotAllowed for a high one unless the actor is a releaser of the
    job's namespace, and Conflict for a job that has ended."""
    job = _locked(session, job_id)
    _refuse_high(actor, priority, job.namespace)
    _refuse_finished(job, "Only a waiting job has a priority.")
    before, job.priority = Priority.of(job.priority), priority.rank
    if before is not priority:
        state = {"priority": before.value}, {"priority": priority.value}
        audit.record(
            session, actor, Act.JOB_PRIORITY, f"job/{job_id}", namespace=job.namespace, before=state[0], after=state[1]
        )
    return job


def _refuse_finished(job: Job, next_step: str) -> None:
    if job.state in FINISHED:
        message = f"Job {job.id} is already {job.state}."
        raise Conflict("job_finished", message, subject=str(job.id), next_step=next_step)


def _locked(session: Session, job_id: int) -> Job:
    """The row, locked until this transaction ends."""
    find(session, job_id)
    return session.get_one(Job, job_id, with_for_update=True, populate_existing=True)


# Retention: finished jobs are removed after a time, unless something that stays refers to them.


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
