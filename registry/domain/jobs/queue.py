"""Jobs as rows: enqueue, claim, note progress, cancel. Nothing here asks what a job does.

queued -> running -> done | refused | failed | cancelled. A worker holds a running job while its heartbeat is fresh;
afterwards another one takes it over at the first unfinished step. A queued job whose heartbeat is still to come was put
off until then.
"""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import and_, func, or_, select, update
from sqlalchemy.orm import Session

from registry.database.tables import Job
from registry.domain.access.audit import Actor
from registry.errors import Conflict, NotFound, TooMany

LEASE = timedelta(seconds=60)
"""How long a silent worker keeps its job."""
MAX_ATTEMPTS = 3
PAUSES = (timedelta(seconds=15), timedelta(minutes=5))
"""Before the second and the third attempt of a job whose stores are away: for a restart, and for a longer repair."""
MAX_QUEUED = 100
"""Of one user: who asks for more than the workers can do waits outside."""
FINISHED = ("done", "refused", "failed", "cancelled")


def enqueue(session: Session, actor: Actor, kind: str, steps: Sequence[str], namespace: str) -> Job:
    waiting = select(func.count()).select_from(Job).where(Job.state == "queued", Job.created_by == actor.name)
    if (session.scalar(waiting) or 0) >= MAX_QUEUED:
        raise TooMany(
            "too_many_jobs",
            f"{MAX_QUEUED} jobs of {actor.name} wait already.",
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
    job = session.get(Job, job_id)
    if job is None:
        raise unknown(job_id)
    return job


def unknown(job_id: int) -> NotFound:
    return NotFound(
        "job_unknown", f"There is no job {job_id}.", subject=str(job_id), next_step="`adaptory jobs` lists them."
    )


def list_page(session: Session, namespaces: Sequence[str] | None, *, before: int, limit: int) -> list[Job]:
    """The newest first; of these namespaces, or of all with None."""
    query = select(Job).order_by(Job.id.desc()).limit(limit)
    if namespaces is not None:
        query = query.where(Job.namespace.in_(namespaces))
    if before:
        query = query.where(Job.id < before)
    return list(session.scalars(query))


def claim(session: Session, worker: str, now: datetime, leave: Collection[int] = ()) -> Job | None:
    """The oldest job that waits or whose worker fell silent, now held by `worker`.

    Those to `leave` are for other workers, but where there is nothing left to do than to cancel them. Beyond
    `MAX_ATTEMPTS` the job has killed its workers: who claims it then is to end it.
    """
    due = and_(Job.state == "queued", or_(Job.heartbeat_at.is_(None), Job.heartbeat_at <= now))
    wanted = or_(Job.id.not_in(leave), Job.cancel_requested)
    free = and_(wanted, or_(due, and_(Job.state == "running", Job.heartbeat_at < now - LEASE)))
    oldest = select(Job.id).where(free).order_by(Job.id).limit(1).scalar_subquery()
    taken = (
        update(Job)
        .where(Job.id == oldest, free)
        .values(state="running", worker=worker, heartbeat_at=now, attempts=Job.attempts + 1, error=None)
    )
    row = session.execute(taken.returning(Job.id), execution_options={"synchronize_session": False}).first()
    return session.get(Job, row[0], populate_existing=True) if row else None


def extend_lease(session: Session, job_id: int, worker: str, now: datetime) -> bool:
    """Keeps the job. False when it was taken over or is to be cancelled: the worker must let go."""
    held = update(Job).where(Job.id == job_id, Job.worker == worker, Job.state == "running")
    row = session.execute(
        held.values(heartbeat_at=now).returning(Job.cancel_requested), execution_options={"synchronize_session": False}
    ).first()
    return row is not None and not row[0]


@dataclass(frozen=True, slots=True)
class Amount:
    """How much of a step is done: bytes or examples."""

    done: int
    total: int
    unit: str

    @property
    def share(self) -> float:
        return min(1.0, self.done / max(self.total, 1))


def note_step(session: Session, job_id: int, worker: str, step: str, *, state: str, progress: float | Amount) -> bool:
    """False, with nothing written, when the job is no longer this worker's: another may have ended it well since."""
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
    """False when the job is no longer this worker's, who then may not end it."""
    held = update(Job).where(Job.id == job_id, Job.worker == worker, Job.state == "running")
    ended = held.values(state=state, finished_at=now, error=error, worker=None).returning(Job.id)
    return session.execute(ended, execution_options={"synchronize_session": False}).first() is not None


def requeue(session: Session, job_id: int, worker: str, error: dict[str, Any] | None = None) -> None:
    """A worker that is told to stop, or lacks what another has: the next one goes on at once; no attempt is counted."""
    held = update(Job).where(Job.id == job_id, Job.worker == worker, Job.state == "running")
    given = held.values(state="queued", worker=None, heartbeat_at=None, attempts=Job.attempts - 1, error=error)
    session.execute(given, execution_options={"synchronize_session": False})


def retry_later(session: Session, job_id: int, worker: str, until: datetime, error: dict[str, Any]) -> None:
    """A worker whose stores are away: nobody goes on before that moment, and the attempt counts."""
    held = update(Job).where(Job.id == job_id, Job.worker == worker, Job.state == "running")
    session.execute(held.values(state="queued", worker=None, heartbeat_at=until, error=error))


def request_cancel(session: Session, job_id: int, now: datetime) -> Job:
    """A job that waits for its first step ends at once, another one when a worker next looks and cleans up after it."""
    job = _locked(session, job_id)
    if job.state in FINISHED:
        raise Conflict(
            "job_finished",
            f"Job {job_id} is {job.state} already.",
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
    """The row, which nobody else can change until this transaction ends."""
    find(session, job_id)
    return session.get_one(Job, job_id, with_for_update=True, populate_existing=True)
