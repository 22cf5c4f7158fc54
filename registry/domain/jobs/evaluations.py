"""Evaluations by workers, of releases and bases on suites. Their results are scores, or only a report."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Self

from sqlalchemy import select
from sqlalchemy.orm import Session

from composer.formats.recipes.suite import Suite
from composer.formats.recipes.tasks import ANSWER_SCORERS
from registry.database.tables import Base, Evaluation, Job, Release, Repository, SuiteVersion
from registry.database.tables.work import StoredPair, StoredResult, StoredUpgrade
from registry.domain.access import audit, tokens
from registry.domain.access.audit import Act, Actor
from registry.domain.access.roles import Role, may
from registry.domain.jobs import queue
from registry.domain.jobs.needs import HARNESS, WorkerNeeds, base_need, scorer_need
from registry.domain.jobs.queue import PLAIN, Wish

KIND = "evaluation"
STEPS = ("measure",)


@dataclass(frozen=True, slots=True)
class WantedScore:
    """A measurement to make: a release by its row's id, None for the base alone, on a base and a suite, by their
    digests."""

    release: int | None
    base: str
    suite: str

    def row(self) -> StoredPair:
        return {"release": self.release, "base": self.base, "suite": self.suite}

    @classmethod
    def of(cls, result: StoredPair) -> Self:
        """The subject of a result that `add_result` keeps."""
        return cls(result["release"], result["base"], result["suite"])


def create(
    session: Session,
    actor: Actor,
    namespaces: Collection[str],
    wanted: Sequence[WantedScore],
    upgrade: StoredUpgrade | None = None,
    wish: Wish = PLAIN,
) -> Job:
    """Queues an evaluation; the job belongs to the namespace of the releases if they have only one. Raises as
    `queue.enqueue`."""
    job = queue.enqueue(session, actor, KIND, STEPS, next(iter(namespaces)) if len(namespaces) == 1 else None, wish)
    queue.declare(session, job, needs_of(session, wanted), wish)
    rows = [subject.row() for subject in dict.fromkeys(wanted)]
    asked = {"token_id": actor.token_id, "source": actor.source}
    session.add(Evaluation(job_id=job.id, wanted=rows, results=[], upgrade=upgrade, **asked))
    session.flush()
    return job


def record_request(session: Session, actor: Actor, job: Job, **after: object) -> None:
    """Writes the audit row of an evaluation that a user requested; `after` names what is measured."""
    subject = f"job/{job.id}"
    audit.record(session, actor, Act.EVALUATION_REQUEST, subject, namespace=job.namespace, after=after)


def needs_of(session: Session, wanted: Sequence[WantedScore]) -> WorkerNeeds:
    """The needs of this measurement: the largest base in memory, each base but for models, which are loaded from
    their own files, and what the suites are measured with."""
    suites = session.scalars(select(SuiteVersion).where(SuiteVersion.digest.in_({subject.suite for subject in wanted})))
    names = {name for suite in suites for name in suite_needs(suite)}
    releases = {subject.release for subject in wanted if subject.release is not None}
    query = select(Release.id).join(Repository, Repository.id == Release.repository_id)
    models = set(session.scalars(query.where(Release.id.in_(releases), Repository.kind == "model")))
    names |= {base_need(subject.base) for subject in wanted if subject.release not in models}
    sizes = select(Base.size_bytes).where(Base.digest.in_({subject.base for subject in wanted}))
    return WorkerNeeds(frozenset(names), memory_bytes=max(session.scalars(sizes), default=0))


def suite_needs(suite: SuiteVersion) -> set[str]:
    """The needs of the suite, besides a model."""
    if suite.task == "harness":
        return {HARNESS}
    if suite.task != "generation":
        return set()
    chosen = Suite.from_json(suite.content).scoring
    name = chosen.name if chosen else "match"
    return set() if name in ANSWER_SCORERS else {scorer_need(name)}


def under_way(session: Session, wanted: Sequence[WantedScore]) -> Job | None:
    """An unfinished job that measures all of this."""
    query = select(Evaluation, Job).join(Job, Job.id == Evaluation.job_id).where(Job.state.not_in(queue.FINISHED))
    for evaluation, job in session.execute(query.order_by(Job.id)):
        if not job.cancel_requested and set(wanted) <= {WantedScore(**row) for row in evaluation.wanted}:
            return job
    return None


def find(session: Session, job_id: int) -> Evaluation:
    """The evaluation of a job."""
    return session.get_one(Evaluation, job_id)


def is_own(session: Session, actor: Actor, job: Job, role: Role = Role.READER) -> bool:
    """Whether the actor requested the evaluation, and has the role in the namespace of each release: a narrower token
    of the same user does not count."""
    if job.created_by != actor.name:
        return False
    measured = {subject["release"] for subject in find(session, job.id).wanted if subject["release"] is not None}
    query = select(Repository.namespace).join(Release, Release.repository_id == Repository.id)
    named = session.scalars(query.where(Release.id.in_(measured)).distinct())
    return all(may(actor, role, namespace) for namespace in named)


def requester(session: Session, job_id: int, now: datetime) -> Actor:
    """The requester of the evaluation, with the current grants."""
    row, job = find(session, job_id), queue.find(session, job_id)
    return tokens.actor_now(session, job.created_by, row.token_id, row.source, now)


def add_result(session: Session, job_id: int, result: StoredResult) -> None:
    """Keeps the result of one release and suite, unless there is one: two workers may have measured it, if one of them
    was thought to be dead."""
    row = session.get_one(Evaluation, job_id, with_for_update=True, populate_existing=True)
    if WantedScore.of(result) in {WantedScore.of(earlier) for earlier in row.results}:
        return
    row.results = [*row.results, result]
