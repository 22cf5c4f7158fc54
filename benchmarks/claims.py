"""Claiming a job: in fair turns among those whose needs a worker meets, against the oldest job whatever it needs.

The oldest is what was claimed before jobs had needs, by the statement of then. Each claim is a transaction; the job
goes back into the queue between two of them, which is not measured.
"""

import time
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from sqlalchemy import insert, or_, select, text, update
from sqlalchemy.orm import Session

from benchmarks import harness, stock
from benchmarks.harness import Sample
from registry.database.engine import Database
from registry.database.migrate import migrate
from registry.database.tables import Job, JobNeed
from registry.domain.jobs import needs, queue
from registry.domain.jobs.needs import LEASE, Offer

KINDS = ("composition", "conflicts", "evaluation")
NAMESPACES, BASES = 40, 20
FLOOR = "the oldest, as before"
Claim = Callable[[Session, datetime], int | None]
CLAIMS = 20
"""In each round."""


def main() -> None:
    chosen = harness.options(__doc__, rounds=15)
    harness.announce("claims", "sqlalchemy", "psycopg")
    with TemporaryDirectory(prefix="bench-claims-") as directory:
        for kind in ("SQLite", "PostgreSQL") if chosen.postgres else ("SQLite",):
            for count in (100, 1_000) if chosen.quick else (100, 10_000):
                file = Path(directory) / f"{count}.db"
                with stock.empty_database(chosen.postgres if kind == "PostgreSQL" else None, file) as url:
                    _measure(f"{kind}, {count:,} queued jobs", url, count, chosen.rounds)


def _measure(title: str, url: str, count: int, rounds: int) -> None:
    with closing(Database(url)) as database:
        migrate(database)
        fill(database, count)
        names = frozenset(f"base:{number:064x}" for number in range(BASES // 2)) | {"harness"}
        offer = Offer(kinds=frozenset(KINDS), names=names, memory_bytes=80 * 10**9)
        cases = {
            FLOOR: partial(_claims, database, _oldest),
            "in turns, any": partial(_claims, database, partial(_claim, offer=None)),
            "in turns, of half of the bases": partial(_claims, database, partial(_claim, offer=offer)),
            "what the jobs need": partial(_looks, database),
        }
        harness.report(title, harness.interleave(cases, rounds), FLOOR, "ms")


def fill(database: Database, count: int) -> None:
    """Queued jobs of many namespaces and bases, half of them with the harness too; 20 are running."""
    now = datetime.now(UTC)
    rows = [
        {
            "kind": KINDS[number % 3], "namespace": f"team-{number % NAMESPACES}", "steps": [], "error": None,
            "state": "running" if number < CLAIMS else "queued", "worker": f"w{number}" if number < CLAIMS else None,
            "heartbeat_at": now.replace(year=now.year + 1) if number < CLAIMS else None, "attempts": 0,
            "cancel_requested": False, "created_at": now, "created_by": "mia", "finished_at": None,
            "priority": number % 3 - 1, "memory_bytes": 2 * 10**9,
        }
        for number in range(count + CLAIMS)
    ]  # fmt: skip
    with database.write() as session:
        ids = list(session.scalars(insert(Job).returning(Job.id), rows))
        needed = [(job_id, f"base:{job_id % BASES:064x}") for job_id in ids]
        needed += [(job_id, "harness") for job_id in ids if job_id % 2]
        session.execute(insert(JobNeed), [{"job_id": job_id, "need": need} for job_id, need in needed])
    with database.write() as session:  # as autovacuum does within a minute; without it PostgreSQL takes 42 ms a claim
        session.execute(text("ANALYZE"))


def _claim(session: Session, now: datetime, *, offer: Offer | None) -> int | None:
    job = queue.claim(session, "bench", now, KINDS, offer)
    return job.id if job else None


def _oldest(session: Session, now: datetime) -> int | None:
    """The statement of the version before."""
    due = (Job.state == "queued") & or_(Job.heartbeat_at.is_(None), Job.heartbeat_at <= now)
    free = Job.kind.in_(KINDS) & or_(due, (Job.state == "running") & (Job.heartbeat_at < now - LEASE))
    oldest = select(Job.id).where(free).order_by(Job.id).limit(1).scalar_subquery()
    taken = update(Job).where(Job.id == oldest, free)
    taken = taken.values(state="running", worker="bench", heartbeat_at=now, attempts=Job.attempts + 1, error=None)
    row = session.execute(taken.returning(Job.id), execution_options={"synchronize_session": False}).first()
    job = session.get(Job, row[0], populate_existing=True) if row else None
    return job.id if job else None


def _claims(database: Database, claim: Claim) -> Sample:
    times: list[float] = []
    for _ in range(CLAIMS):
        now = datetime.now(UTC)
        started = time.perf_counter()
        with database.write() as session:
            claimed = claim(session, now)
        times.append(time.perf_counter() - started)
        assert claimed is not None
        with database.write() as session:
            back = update(Job).where(Job.id == claimed)
            session.execute(back.values(state="queued", worker=None, heartbeat_at=None))
    return Sample(median(times), calls=tuple(times))


def _looks(database: Database) -> Sample:
    def look() -> None:
        with database.read() as session:
            needs.wanted(session)

    return harness.calls(look, CLAIMS)


if __name__ == "__main__":
    main()
