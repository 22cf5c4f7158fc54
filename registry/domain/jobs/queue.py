"""The job queue in the database: enqueue, claim, record progress, cancel. Independent of what a job does.

queued -> running -> done | refused | failed | cancelled. A worker holds a running job while its heartbeat is fresh;
afterwards another worker takes over at the first unfinished step. A queued job with a heartbeat in the future waits
until then.
"""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, and_, func, or_, select, update
from sqlalchemy.orm import Session

from registry.database.tables import Job
from registry.domain.access.audit import Actor
from registry.errors import Conflict, NotFound, TooMany

LEASE = timedelta(seconds=60)
"""How long a silent worker keeps its job."""
MAX_ATTEMPTS = 3
PAUSES = (timedelta(seconds=15), timedelta(minutes=5))
"""Before the second and third attempt of a job whose stores are unavailable: for a restart, and for a longer repair."""
MAX_QUEUED = 100
"""Maximum queued jobs per user."""
FINISHED = ("done", "refused", "failed", "cancelled")


def enqueue(session: Session, actor: Actor, kind: str, steps: Sequence[str], namespace: str | None) -> Job:
    """Adds a job with these steps. Raises TooMany if the user has MAX_QUEUED jobs waiting."""
    waiting = select(func.count()).select_from(Job).where(Job.state == "queued", Job.created_by == actor.name)
    if (session.scalar(waiting) or 0) >= MAX_QUEUED:
        raise TooMany(
            "too_many_jobs",
            f"{MAX_QUEUED} jobs of {actor.name} are already queued.",
            subject=actor.name,
            next_step="Wait for some of them, or cancel them: `adaptory jobs`.",
        )
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
    )
    session.add(job)
    session.flush()
    return job


def find(session: Session, job_id: int) -> Job:
    """The job. Raises NotFound."""
    job = session.get(Job, job_id)
    if job is None:
        raise unknown(job_id)
    return job


def unknown(job_id: int) -> NotFound:
    """The error for a job that does not exist or that the actor may not see."""
    return NotFound(
        "job_unknown", f"There is no job {job_id}.", subject=str(job_id), next_step="`adaptory jobs` lists them."
    )


def list_page(session: Session, namespaces: Sequence[str] | None, *, before: int, limit: int) -> list[Job]:
    """Jobs, newest first, in these namespaces, or in all with None."""
    query = select(Job).order_by(Job.id.desc()).limit(limit)
    if namespaces is not None:
        query = query.where(Job.namespace.in_(namespaces))
    if before:
        query = query.where(Job.id < before)
    return list(session.scalars(query))


def unfinished(session: Session) -> list[tuple[str, str, int, datetime]]:
    """Kind, state, number and oldest time of creation of the jobs that are queued or running."""
    query = select(Job.kind, Job.state, func.count(), func.min(Job.created_at))
    query = (
        query.where(Job.state.in_(("queued", "running"))).group_by(Job.kind, Job.state).order_by(Job.kind, Job.state)
    )
    return [(kind, state, count, since) for kind, state, count, since in session.execute(query)]


def claim(
    session: Session, worker: str, now: datetime, kinds: Collection[str], leave: Collection[int] = ()
) -> Job | None:
    """Claims the oldest job of these kinds that is due or whose worker fell silent.

    Jobs to `leave` are for other workers, unless they only need to be cancelled. A job beyond `MAX_ATTEMPTS` has killed
    its workers: the caller must end it.
    """
    wanted = or_(Job.id.not_in(leave), Job.cancel_requested)
    free = and_(Job.kind.in_(kinds), wanted, _free(now))
    oldest = select(Job.id).where(free).order_by(Job.id).limit(1).scalar_subquery()
    taken = (
        update(Job)
        .where(Job.id == oldest, free)
        .values(state="running", worker=worker, heartbeat_at=now, attempts=Job.attempts + 1, error=None)
    )
    row = session.execute(taken.returning(Job.id), execution_options={"synchronize_session": False}).first()
    return session.get(Job, row[0], populate_existing=True) if row else None


def before(session: Session, job_id: int, now: datetime) -> list[Job]:
    """The jobs that a worker which begins now claims before this one, the oldest first."""
    return list(session.scalars(select(Job).where(Job.id < job_id, _free(now)).order_by(Job.id)))


def _free(now: datetime) -> ColumnElement[bool]:
    """Whether a job is due, or its worker fell silent."""
    due = and_(Job.state == "queued", or_(Job.heartbeat_at.is_(None), Job.heartbeat_at <= now))
    return or_(due, and_(Job.state == "running", Job.heartbeat_at < now - LEASE))


def extend_lease(session: Session, job_id: int, worker: str, now: datetime) -> bool:
    """Extends the worker's hold on the job. False if it was taken over or cancelled: the worker must stop."""
    held = update(Job).where(Job.id == job_id, Job.worker == worker, Job.state == "running")
    row = session.execute(
        held.values(heartbeat_at=now).returning(Job.cancel_requested), execution_options={"synchronize_session": False}
    ).first()
    return row is not None and not row[0]


@dataclass(frozen=True, slots=True)
class Amount:
    """Progress of a step, in bytes or examples."""

    done: int
    total: int
    unit: str

    @property
    def share(self) -> float:
        return min(1.0, self.done / max(self.total, 1))


def note_step(session: Session, job_id: int, worker: str, step: str, *, state: str, progress: float | Amount) -> bool:
    """Records a step's state. Returns False and writes nothing if the job is no longer this worker's."""
    job = _locked(session, job_id)
    if job.worker != worker or job.state != "running":
        return False
    amount = asdict(progress) if isinstance(progress, Amount) else {}
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
    return session.execute(ended, execution_options={"synchronize_session": False}).first() is not None


def requeue(session: Session, job_id: int, worker: str, error: dict[str, Any] | None = None) -> None:
    """Returns the job to the queue, for a worker that stops or lacks something local. Does not count an attempt."""
    held = update(Job).where(Job.id == job_id, Job.worker == worker, Job.state == "running")
    given = held.values(state="queued", worker=None, heartbeat_at=None, attempts=Job.attempts - 1, error=error)
    session.execute(given, execution_options={"synchronize_session": False})


def retry_later(session: Session, job_id: int, worker: str, until: datetime, error: dict[str, Any]) -> None:
    """Returns the job to the queue, to run after `until`, when the stores were unavailable. Counts the attempt."""
    held = update(Job).where(Job.id == job_id, Job.worker == worker, Job.state == "running")
    session.execute(held.values(state="queued", worker=None, heartbeat_at=until, error=error))


def request_cancel(session: Session, job_id: int, now: datetime) -> Job:
    """Cancels a job: immediately if no step has started, else when its worker next checks and cleans up."""
    job = _locked(session, job_id)
    if job.state in FINISHED:
        raise Conflict(
            "job_finished",
            f"Job {job_id} is already {job.state}.",
            subject=str(job_id),
            next_step="There is nothing to cancel.",
        )
    job.cancel_requested = True
    if job.state == "queued":
        job.heartbeat_at = None
        if all(step["state"] == "waiting" for step in job.steps):
            job.state, job.finished_at = "cancelled", now
    return job


def _locked(session: Session, job_id: int) -> Job:
    """The row, locked until this transaction ends."""
    find(session, job_id)
    return session.get_one(Job, job_id, with_for_update=True, populate_existing=True)
