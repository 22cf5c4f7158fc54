"""The job that a worker gets, compared with a plain list: needs, fairness between namespaces, priority, age, no
starvation."""

from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import delete

from registry.database.engine import Database
from registry.database.tables import Job
from registry.domain.access.audit import Actor
from registry.domain.access.roles import Reach
from registry.domain.jobs import needs, queue
from registry.domain.jobs.needs import Offer, WorkerNeeds
from registry.domain.jobs.queue import OVERDUE, Wish
from registry.formats.priority import Priority
from tests import services

START = datetime(2026, 1, 1, tzinfo=UTC)
KINDS = ("composition", "evaluation")
OFFERS = (
    Offer(kinds=frozenset(KINDS), names=frozenset({"base:a", "base:b", "harness"}), memory_bytes=100),
    Offer(kinds=frozenset(KINDS), names=frozenset({"base:a"}), memory_bytes=10),
    Offer(kinds=frozenset({"evaluation"}), names=frozenset({"base:b", "harness"}), memory_bytes=100),
)
NEEDS = st.sets(st.sampled_from(["base:a", "base:b", "harness"]), max_size=2).map(frozenset)
ENQUEUE = st.tuples(
    st.just("enqueue"),
    st.sampled_from(KINDS),
    st.sampled_from(["acme", "busy", "calm", None]),
    st.sampled_from(list(Priority)),
    NEEDS,
    st.sampled_from([0, 10, 50]),
)
CLAIM = st.tuples(st.just("claim"), st.integers(0, 2))
FINISH = st.tuples(st.just("finish"), st.integers(0, 30))
PASS = st.tuples(st.just("pass"), st.sampled_from([1, 61, 3600, 5 * 3600]))


@dataclass(slots=True)
class Model:
    """Jobs as a list. `passed` counts for each job the claims of others after it was overdue, by who could run it."""

    now: datetime = START
    jobs: dict[int, dict[str, Any]] = field(default_factory=dict[int, dict[str, Any]])
    passed: Counter[int] = field(default_factory=Counter[int])

    def free(self, offer: Offer) -> list[dict[str, Any]]:
        """Those that this worker may take."""
        return [
            job
            for job in self.jobs.values()
            if job["state"] == "queued" or (job["state"] == "running" and not self.alive(job))
            if job["kind"] in offer.kinds and not offer.lacking(job["needs"])
        ]

    def alive(self, job: dict[str, Any]) -> bool:
        return job["state"] == "running" and job["beat"] >= self.now - queue.LEASE

    def overdue(self, job: dict[str, Any]) -> bool:
        return job["created"] < self.now - OVERDUE

    def claim(self, offer: Offer) -> int | None:
        """The job that the worker must get."""
        free = self.free(offer)
        if not free:
            return None
        running = Counter(job["namespace"] for job in self.jobs.values() if self.alive(job))
        overdue = [job for job in free if self.overdue(job)]
        first = min(overdue or free, key=lambda job: job["id"])
        if not overdue:
            first = min(free, key=lambda job: (running[job["namespace"]], -job["priority"].rank, job["id"]))
        for job in overdue:
            if job is not first:
                self.passed[job["id"]] += 1
        first.update(state="running", beat=self.now, claims=first["claims"] + 1)
        return first["id"]


@pytest.fixture(scope="module", params=services.DATABASES)
def database(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Generator[Database]:
    directory: Path = tmp_path_factory.mktemp("claims")
    opened = Database(services.new_database_of(request.param, directory, migrated=True))
    yield opened
    opened.close()


@pytest.mark.on("PostgreSQL")
@settings(max_examples=40)
@given(steps=st.lists(st.one_of(ENQUEUE, CLAIM, CLAIM, FINISH, PASS), min_size=15, max_size=60))
def test_a_worker_gets_the_job_that_is_first_and_none_is_passed_over_for_ever(
    database: Database, steps: list[tuple[Any, ...]]
) -> None:
    model = Model()
    with database.write() as session:
        session.execute(delete(Job))
    for step in steps:
        match step:
            case ("enqueue", kind, namespace, priority, names, memory):
                _enqueue(database, model, kind, namespace, priority, WorkerNeeds(names, memory_bytes=memory))
            case ("claim", number):
                with database.write() as session:
                    claimed = queue.claim(session, f"w{number}", model.now, KINDS, OFFERS[number])
                    got = claimed.id if claimed else None
                assert got == model.claim(OFFERS[number])
            case ("finish", number):
                _finish(database, model, number)
            case (_, seconds):
                model.now += timedelta(seconds=seconds)
        model.now += timedelta(seconds=1)
    for job_id, times in model.passed.items():  # the bound: each older job goes first once for each time it is claimed
        assert times <= sum(job["claims"] for job in model.jobs.values() if job["id"] < job_id)


def _enqueue(
    database: Database, model: Model, kind: str, namespace: str | None, priority: Priority, needed: WorkerNeeds
) -> None:
    actor = Actor("mia", model.now, {"*": "admin"})
    with database.write() as session:
        wish = Wish(priority=priority)
        row = queue.enqueue(session, actor, kind, ["one"], namespace, wish)
        queue.declare(session, row, needed, wish)
        model.jobs[row.id] = {
            "id": row.id, "kind": kind, "namespace": namespace, "priority": priority, "needs": needed,
            "state": "queued", "created": model.now, "beat": None, "claims": 0,
        }  # fmt: skip


def _finish(database: Database, model: Model, number: int) -> None:
    running = [job for job in model.jobs.values() if job["state"] == "running"]
    if not running:
        return
    job = running[number % len(running)]
    with database.write() as session:
        row = session.get_one(Job, job["id"])
        assert queue.finish(session, job["id"], row.worker or "", "done", model.now)
    job["state"] = "done"


@pytest.mark.on("PostgreSQL")
def test_what_no_worker_lacks_is_claimed_and_what_one_lacks_waits(database: Database) -> None:
    with database.write() as session:
        session.execute(delete(Job))
    model = Model()
    _enqueue(database, model, "evaluation", "acme", Priority.HIGH, WorkerNeeds(frozenset({"base:c"})))
    _enqueue(database, model, "evaluation", "acme", Priority.LOW, WorkerNeeds(memory_bytes=11))
    with database.write() as session:
        assert queue.claim(session, "small", START, KINDS, OFFERS[1]) is None
        for number, offer in enumerate(OFFERS[:2]):
            needs.announce(session, f"w{number}", offer, START)
        first, second = queue.list_page(session, Reach(None), before=0, limit=5)[::-1]
        waits = needs.waiting(session, [first, second], START)
        assert waits == {first.id: "a worker that has the base c", second.id: "a worker that is free"}
        claimed = queue.claim(session, "w0", START, KINDS, OFFERS[0])
        assert claimed is not None
        assert claimed.id == second.id
        without = queue.claim(session, "alone", START, KINDS)
        assert without is not None
        assert without.id == first.id, "the only worker takes what it lacks, and says so"


def test_a_job_that_is_cancelled_while_its_store_is_away_does_not_wait_for_its_next_attempt(database: Database) -> None:
    with database.write() as session:
        session.execute(delete(Job))
    for cancelled in (False, True):
        model = Model()
        _enqueue(database, model, "evaluation", "acme", Priority.NORMAL, WorkerNeeds())
        (job_id,) = model.jobs
        with database.write() as session:
            assert queue.claim(session, "w", START, KINDS)
            if cancelled:
                queue.request_cancel(session, job_id, START)
            queue.retry_later(session, job_id, "w", START + timedelta(minutes=5), {})
        with database.write() as session:
            taken = queue.claim(session, "w", START, KINDS)
            assert (taken is not None and taken.id == job_id) == cancelled
