"""The needs of jobs, the offers of workers, and the needs that a job waits for. Each worker announces its offer every
few seconds (`WorkerRow`), and claims only jobs whose needs it meets. A job that no worker meets shows what it waits
for, and ends after PATIENCE with an error that names what is missing.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, and_, delete, exists, insert, select
from sqlalchemy.orm import Session

from registry.database.engine import insert_if_absent
from registry.database.tables import Base, BaseLocation, Job, JobNeed, WorkerRow
from registry.errors import NotFound, Refused, RegistryError
from registry.formats.paths import without_directories

UNFINISHED = ("queued", "running")
LEASE = timedelta(seconds=60)
"""How long a silent worker keeps its job, and counts as running."""
HARNESS, EVOLUTION = "harness", "evolution"
_BASE, _SCORER = "base:", "scorer:"
_MEMORY = "memory"
PATIENCE: Mapping[str, timedelta] = {
    "base": timedelta(hours=1),
    _MEMORY: timedelta(hours=1),
    HARNESS: timedelta(minutes=10),
    EVOLUTION: timedelta(minutes=10),
    "scorer": timedelta(minutes=10),
}
"""How long a job waits for a worker that meets this need."""
_SHORTEST = min(PATIENCE.values())
FORGOTTEN = timedelta(days=1)
"""When a worker's row is removed: long after the jobs that waited for it have ended."""
_BATCH = 100


@dataclass(frozen=True, slots=True)
class WorkerNeeds:
    """Requirements on a worker: needs by name, and bytes of its device's memory."""

    names: frozenset[str] = frozenset()
    _: KW_ONLY
    memory_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A worker's capabilities: the kinds of jobs that it runs, the needs that it meets, and bytes of its device's
    memory."""

    kinds: frozenset[str]
    names: frozenset[str] = field(default=frozenset())
    memory_bytes: int

    def lacking(self, needs: WorkerNeeds) -> set[str]:
        """The needs that the offer does not meet."""
        return {*(needs.names - self.names), *({_MEMORY} if needs.memory_bytes > self.memory_bytes else ())}


def base_need(digest: str) -> str:
    """A base's weights, from a location that the worker can read."""
    return f"{_BASE}{digest}"


def scorer_need(name: str) -> str:
    """A Python scorer, installed and enabled."""
    return f"{_SCORER}{name}"


def base_of(need: str) -> str | None:
    """The digest of the base that the need names, if it is one."""
    return need.removeprefix(_BASE) if need.startswith(_BASE) else None


def scorer_of(need: str) -> str | None:
    """The scorer that the need names, if it is one."""
    return need.removeprefix(_SCORER) if need.startswith(_SCORER) else None


def declare(session: Session, job: Job, needs: WorkerNeeds) -> None:
    """Declares the job's needs, replacing earlier ones."""
    session.execute(delete(JobNeed).where(JobNeed.job_id == job.id))
    if needs.names:
        session.execute(insert(JobNeed), [{"job_id": job.id, "need": need} for need in sorted(needs.names)])
    job.memory_bytes = needs.memory_bytes
    session.flush()


def are_undeclared(session: Session) -> bool:
    """Whether any unfinished job has no declared needs."""
    return session.scalar(select(exists().where(Job.state.in_(UNFINISHED), Job.memory_bytes.is_(None)))) or False


def undeclared(session: Session) -> list[Job]:
    """Some unfinished jobs without declared needs, locked: an older version queued them."""
    query = select(Job).where(Job.state.in_(UNFINISHED), Job.memory_bytes.is_(None))
    return list(session.scalars(query.order_by(Job.id).limit(_BATCH).with_for_update(skip_locked=True)))


def needs_of(session: Session, jobs: Collection[Job]) -> dict[int, WorkerNeeds]:
    """The declared needs of jobs, by their numbers."""
    names: dict[int, set[str]] = {job.id: set() for job in jobs}
    query = select(JobNeed.job_id, JobNeed.need).where(JobNeed.job_id.in_(names))
    for job_id, need in session.execute(query):
        names[job_id].add(need)
    return {job.id: WorkerNeeds(frozenset(names[job.id]), memory_bytes=job.memory_bytes or 0) for job in jobs}


@dataclass(frozen=True, slots=True)
class WantedNeeds:
    """All needs of unfinished jobs, the locations and sizes of the bases among them by digest, and whether any job
    needs memory of a device."""

    names: frozenset[str]
    bases: Mapping[str, tuple[Sequence[str], int]]
    memory: bool


def wanted(session: Session) -> WantedNeeds:
    """The names that a worker looks for on its host."""
    jobs = select(Job.id).where(Job.state.in_(UNFINISHED))
    names = frozenset(session.scalars(select(JobNeed.need).where(JobNeed.job_id.in_(jobs)).distinct()))
    digests = [digest for digest in map(base_of, names) if digest is not None]
    sizes = session.execute(select(Base.digest, Base.size_bytes).where(Base.digest.in_(digests))).all()
    urls: dict[str, list[str]] = {digest: [] for digest in digests}
    placed = select(BaseLocation.base_digest, BaseLocation.url).where(BaseLocation.base_digest.in_(digests))
    for digest, url in session.execute(placed.order_by(BaseLocation.url)):
        urls[digest].append(url)
    memory = session.scalar(select(exists().where(Job.state.in_(UNFINISHED), Job.memory_bytes > 0))) or False
    return WantedNeeds(names, {digest: (urls[digest], size_bytes) for digest, size_bytes in sizes}, memory)


def met_by(offer: Offer) -> ColumnElement[bool]:
    """The condition of a job whose needs are declared and met by the offer."""
    lacking = exists().where(JobNeed.job_id == Job.id, JobNeed.need.not_in(sorted(offer.names)))
    return and_(Job.kind.in_(sorted(offer.kinds)), Job.memory_bytes <= offer.memory_bytes, ~lacking)


def announce(session: Session, worker: str, offer: Offer, now: datetime) -> None:
    """Records the worker's offer, and that it is alive."""
    insert_if_absent(session, WorkerRow, name=worker, seen_at=now, kinds=[], offers=[], memory_bytes=0)
    row = session.get_one(WorkerRow, worker, populate_existing=True)
    row.seen_at, row.kinds, row.offers = now, sorted(offer.kinds), sorted(offer.names)
    row.memory_bytes = offer.memory_bytes


def forget_workers(session: Session, now: datetime) -> None:
    """Removes the rows of workers that have long ended."""
    session.execute(delete(WorkerRow).where(WorkerRow.seen_at < now - FORGOTTEN))


def waiting(session: Session, jobs: Collection[Job], now: datetime) -> dict[int, str]:
    """Names what each queued job waits for, by its number, such as `a worker that has the base tiny`."""
    queued = [job for job in jobs if job.state == "queued"]
    if not queued:
        return {}
    live = [offer for seen_at, offer in _workers(session) if seen_at >= now - LEASE]
    needs = needs_of(session, queued)
    digests = {base_of(need) for needed in needs.values() for need in needed.names}
    names = dict(session.execute(select(Base.digest, Base.name).where(Base.digest.in_(digests - {None}))).all())
    return {job.id: _waits_for(job, needs[job.id], live, names, now) for job in queued}


def _waits_for(job: Job, needs: WorkerNeeds, live: Sequence[Offer], names: Mapping[str, str], now: datetime) -> str:
    if job.heartbeat_at is not None and job.heartbeat_at > now:
        return f"its next attempt, at {job.heartbeat_at:%H:%M:%S} UTC"
    if not live:
        return "a worker: none is running"
    able = [offer for offer in live if job.kind in offer.kinds]
    if not able:
        return f"a worker that runs jobs of kind {job.kind}: none is running"
    lacking = _least_lacking(needs, able)
    if not lacking:
        return "a worker that is free"
    return f"a worker that has {' and '.join(_described(need, needs, names) for need in sorted(lacking))}"


def _least_lacking(needs: WorkerNeeds, offers: Sequence[Offer]) -> set[str]:
    """The needs that the best offer does not meet."""
    return min((offer.lacking(needs) for offer in offers), key=lambda one: (len(one), sorted(one)))


def _described(need: str, needs: WorkerNeeds, names: Mapping[str, str]) -> str:
    if (digest := base_of(need)) is not None:
        return f"the base {names.get(digest, digest[:12])}"
    if (scorer := scorer_of(need)) is not None:
        return f"the scorer {scorer}"
    return {
        HARNESS: "lm-evaluation-harness",
        EVOLUTION: "the package cmaes",
        _MEMORY: f"{_size(needs.memory_bytes)} of device memory",
    }.get(need, need)  # that of a newer version


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:,.1f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:,.1f} MB"


def unmet(session: Session, due: ColumnElement[bool], now: datetime) -> list[tuple[Job, RegistryError]]:
    """Some jobs among those `due` that no worker has met for PATIENCE, each with the error to end it with."""
    workers = _workers(session)
    live = [offer for seen_at, offer in workers if seen_at >= now - LEASE]
    if not live:
        return []
    met = [met_by(offer) for offer in dict.fromkeys(live)]
    run = {kind for offer in live for kind in offer.kinds}
    old = (Job.created_at < now - _SHORTEST, Job.kind.in_(sorted(run)), Job.memory_bytes.is_not(None))
    query = select(Job).where(due, *old, *(~condition for condition in met)).order_by(Job.id).limit(_BATCH)
    jobs = list(session.scalars(query))
    needs = needs_of(session, jobs)
    ended: list[tuple[Job, RegistryError]] = []
    for job in jobs:
        able = [(seen_at, offer) for seen_at, offer in workers if job.kind in offer.kinds]
        since = max([job.created_at, *(seen for seen, offer in able if not offer.lacking(needs[job.id]))])
        lacking = _least_lacking(needs[job.id], [offer for offer in live if job.kind in offer.kinds])
        if any(_kind_of(need) not in PATIENCE for need in lacking):  # of a newer version, whose workers end it
            continue
        first = min(sorted(lacking), key=_patience_of)
        if now - since >= _patience_of(first):
            ended.append((job, _error(session, first, needs[job.id])))
    return ended


def _patience_of(need: str) -> timedelta:
    return PATIENCE[_kind_of(need)]


def _kind_of(need: str) -> str:
    return need.partition(":")[0]


def _error(session: Session, need: str, needs: WorkerNeeds) -> RegistryError:
    """The error of a job that waited in vain: the same that a worker without this raises when it is the only one."""
    waited = f"No worker that has it took the job within {_patience_of(need).total_seconds() / 60:.0f} minutes."
    if (digest := base_of(need)) is not None:
        base = session.get_one(Base, digest)
        urls = list(session.scalars(select(BaseLocation.url).where(BaseLocation.base_digest == digest)))
        known = without_directories(", ".join(urls) or "it has none")
        missing = f"No worker can find the base {base.name} at any location ({known})."
        step = "Add one on the host of a worker: `adaptory base add DIR`."
        return NotFound("base_not_here", f"{missing} {waited}", subject=digest, next_step=step)
    if (scorer := scorer_of(need)) is not None:
        message = f"The scorer {scorer} is not installed and enabled where workers run. {waited}"
        step = "If you trust it, install its package, and name it in ADAPTORY_SCORERS, where workers run."
        return Refused("scorer_disabled", message, subject=scorer, next_step=step)
    if need == HARNESS:
        message = f"A suite is a task of lm-evaluation-harness, which no worker has. {waited}"
        step = "Install adaptory with its extra `eval` where workers run."
        return Refused("harness_missing", message, subject=HARNESS, next_step=step)
    if need == EVOLUTION:
        message = f"Weights by an evolution strategy need the package cmaes, which no worker has. {waited}"
        step = "Install adaptory with its extra `optimize` where workers run, or leave `evolve` out."
        return Refused("evolution_missing", message, subject="evolve", next_step=step)
    return Refused(
        "device_too_small",
        f"No worker that meets the other needs has {_size(needs.memory_bytes)} of device memory. {waited}",
        subject="memory_bytes",
        next_step="Start a worker on a larger device, or repeat the request with a lower `memory_bytes`: a model "
        "that does not fit is then read from disk, layer by layer.",
    )


def _workers(session: Session) -> list[tuple[datetime, Offer]]:
    """All recorded workers: when each was last seen, and its offer then."""
    return [
        (
            row.seen_at,
            Offer(kinds=frozenset(row.kinds), names=frozenset(row.offers), memory_bytes=row.memory_bytes),
        )
        for row in session.scalars(select(WorkerRow))
    ]
