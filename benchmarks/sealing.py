"""The cost of sealing the audit log for moves, and the rows that it seals a second.

python -m benchmarks.sealing [moves] [rounds] [postgresql]

Each round makes moves alone, then as many while another process seals a backlog. Prints the rows sealed a second, and
the time of a move beside the sealing as a multiple of its time alone.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from sqlalchemy import insert

from benchmarks.harness import percentile
from registry.database.tables import AuditRow
from registry.domain.access.audit_chain import last
from registry.transfer.sealing import seal_all
from tests import services
from tests.access.house import PRIVATE, House, new_house, opened

BACKLOG = 40_000
PATH = f"/v1/adapters/{PRIVATE}/sql/channels/prod"


def fill(house: House, rows: int) -> None:
    """Adds audit rows like those of promotions, as one transaction."""
    now, state = datetime.now(UTC), {"version": "1.1.0", "move": 12, "gates": [{"rule": "sql >= 0.8", "passed": True}]}
    row: dict[str, Any] = {"at": now, "actor": "pia", "act": "channel:promote", "subject": "acme/sql@prod"}
    row |= {"namespace": "acme", "token_id": "0123456789ab", "source": "10.0.0.1 adaptory", "reason": "weekly"}
    row |= {"before": {"version": "1.0.0"}, "after": state, "detail": {}}
    with house.resources.write() as session:
        session.execute(insert(AuditRow), [row] * rows)


def move(house: House, count: int) -> list[float]:
    """The seconds of each of `count` moves, by REST in this process."""
    taken: list[float] = []
    for number in range(count):
        began_s = time.perf_counter()
        answer = house.ask("operator", "PUT", PATH, json={"version": ("1.0.0", "1.1.0")[number % 2]})
        taken.append(time.perf_counter() - began_s)
        assert answer.status_code == 200, answer.text
    return taken


@contextmanager
def sealing(house: House) -> Iterator[subprocess.Popen[str]]:
    """Another process that seals the backlog, from its first seal on."""
    command = [sys.executable, "-m", "benchmarks.sealing", "seal"]
    with house.resources.read() as session:
        before = last(session)
    process = subprocess.Popen(command, env=os.environ | dict(house.environ), stdout=subprocess.PIPE, text=True)
    began = False
    while not began:
        assert process.poll() is None, "sealing ended before its first seal"
        with house.resources.read() as session:
            began = last(session) != before
    yield process
    process.wait()


def seal() -> None:
    """Seals everything, and prints how many rows a second."""
    resources = opened(dict(os.environ))
    with resources.read() as session:
        before = last(session)
    began_s = time.perf_counter()
    seal_all(resources)
    taken_s = time.perf_counter() - began_s
    with resources.read() as session:
        after = last(session)
    assert after is not None
    print((after.number - (before.number if before else 0)) / taken_s)


def main() -> None:
    if sys.argv[1:] == ["seal"]:
        seal()
        return
    moves, rounds = (int(text) for text in [*sys.argv[1:3], "100", "5"][:2]) if len(sys.argv) > 2 else (100, 5)
    alone, beside, per_second = list[float](), list[float](), list[float]()
    with tempfile.TemporaryDirectory() as directory:
        os.environ[services.DIRECTORY] = directory
        house = new_house(services.PAIRINGS["postgresql" in sys.argv], Path(directory) / "home")
        move(house, 10)
        for _ in range(rounds):
            fill(house, BACKLOG)
            alone += move(house, moves)
            with sealing(house) as process:
                beside += move(house, moves)
                lasted = process.poll() is None
                per_second.append(float(process.communicate()[0]))
            assert lasted, "the backlog was sealed before the moves were made"
        house.close()
    print(f"{median(per_second):,.0f} rows sealed a second beside moves (median of {rounds})")
    for named, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99)):
        before, during = percentile(alone, share), percentile(beside, share)
        ratio = f"{during / before:.2f} times"
        print(f"a move, {named}: {before * 1e3:.1f} ms alone, {during * 1e3:.1f} beside sealing ({ratio})")


if __name__ == "__main__":
    main()
