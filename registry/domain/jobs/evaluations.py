"""Evaluations that workers do: releases and bases on suites. Their results are scores, or only a report."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Self

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry.database.tables import Evaluation, Job
from registry.domain.access import tokens
from registry.domain.access.audit import Actor
from registry.domain.jobs import queue

KIND = "evaluation"
STEPS = ("measure",)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to measure: a release by its row's id, None for the base alone, on a base and a suite, by their digests."""

    release: int | None
    base: str
    suite: str

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> Self:
        """What a result that `add_result` keeps was measured of."""
        return cls(result["release"], result["base"], result["suite"])


def create(
    session: Session,
    actor: Actor,
    namespaces: Collection[str],
    wanted: Sequence[Wanted],
    upgrade: dict[str, Any] | None = None,
) -> Job:
    """Queues an evaluation; the job belongs to the namespace of the releases if they have only one. Raises TooMany as
    `queue.enqueue`."""
    job = queue.enqueue(session, actor, KIND, STEPS, next(iter(namespaces)) if len(namespaces) == 1 else None)
    rows = [asdict(one) for one in dict.fromkeys(wanted)]
    asked = {"token_id": actor.token_id, "source": actor.source}
    session.add(Evaluation(job_id=job.id, wanted=rows, results=[], upgrade=upgrade, **asked))
    session.flush()
    return job


def under_way(session: Session, wanted: Sequence[Wanted]) -> Job | None:
    """An unfinished job that measures all of this."""
    query = select(Evaluation, Job).join(Job, Job.id == Evaluation.job_id).where(Job.state.not_in(queue.FINISHED))
    for evaluation, job in session.execute(query.order_by(Job.id)):
        if not job.cancel_requested and set(wanted) <= {Wanted(**row) for row in evaluation.wanted}:
            return job
    return None


def find(session: Session, job_id: int) -> Evaluation:
    """The evaluation of a job."""
    return session.get_one(Evaluation, job_id)


def requester(session: Session, job_id: int, now: datetime) -> Actor:
    """Who asked for the evaluation, with the current grants."""
    row, job = find(session, job_id), queue.find(session, job_id)
    return tokens.actor_now(session, job.created_by, row.token_id, row.source, now)


def add_result(session: Session, job_id: int, result: dict[str, Any]) -> None:
    """Keeps the result of one release and suite, unless there is one: two workers may have measured it, if one of them
    was thought to be dead."""
    row = session.get_one(Evaluation, job_id, with_for_update=True, populate_existing=True)
    if Wanted.of(result) in {Wanted.of(one) for one in row.results}:
        return
    row.results = [*row.results, result]
