"""Search over 1,000 and over 100,000 releases, on both databases: what does the size of the registry cost?

Each query runs in process (search and the page's documents, in a read transaction) on each size in turn, so that a
ratio compares two calls a moment apart; then by eight clients over HTTP. Extra words are added, some of them to old
releases only; a page of those is short enough to be full at either size. One reader may read only the oldest releases.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlencode

from sqlalchemy import insert, text

from benchmarks import harness, load, resolve, stock
from benchmarks.harness import Case
from composer.formats.adapters.serving import parse_profile
from registry.api.routes.documents import release_document
from registry.database.engine import Database
from registry.database.tables import ReleaseWord
from registry.domain.access.audit import Actor
from registry.domain.access.roles import EVERYWHERE
from registry.domain.catalog.release_rows import load_details
from registry.domain.catalog.suites import parse_condition
from registry.domain.search import search
from registry.domain.search.ordering import NEWEST, VERSION, Order
from registry.domain.search.query import Query
from registry.formats.references import RepositoryName

SIZES = (1_000, 100_000)
LIMIT, CLIENTS = 50, 8
SHORT = 10
"""A page of what one release in a hundred matches, in the smaller registry."""
SOWN: dict[str, Callable[[int, int], bool]] = {
    "tenth": lambda number, _: number % 10 == 0,
    "fiftieth": lambda number, _: number % 50 == 0,
    "hundredth": lambda number, _: number % 100 == 0,
    "oldest": lambda number, releases: number <= releases // 50,
    "older": lambda number, releases: number <= releases // 2,
    "odd": lambda number, _: number % 2 == 1,
    "even": lambda number, _: number % 2 == 0,
}
"""Word -> whether release `number` of `releases` has it."""
NOW = datetime(2026, 1, 1, tzinfo=UTC)
HOST = Actor("host", NOW, {EVERYWHERE: "admin"})
OF_THE_OLDEST = Actor("reader", NOW, {"team-0": "reader"})
"""May read the first 500 releases."""
BASE = stock.BASES[0]
TARGETS = ("q_proj", "v_proj")
VLLM = parse_profile("vllm:32")
FITTING = Query(base=BASE, max_rank=16, targets_within=TARGETS)

QUERIES: dict[str, tuple[Query, str]] = {
    "base, rank, targets": (FITTING, NEWEST),
    "base, rank, targets, server": (
        Query(base=BASE, max_rank=16, targets_within=TARGETS, loads_in=VLLM),
        NEWEST,
    ),
    "base, rank, targets: nothing fits": (Query(base=BASE, max_rank=3, targets_within=TARGETS), NEWEST),
    "base, rank, targets by score": (FITTING, "sql-exact.accuracy"),
    "base, rank, targets by version": (FITTING, VERSION),
    "base, rank, score": (
        Query(base=BASE, max_rank=16, score=(parse_condition("sql-exact.accuracy>=0.5"),)),
        NEWEST,
    ),
    "a score that none has": (Query(base=BASE, score=(parse_condition("sql-exact.accuracy>=2"),)), NEWEST),
    "everything": (Query(), NEWEST),
    "what a channel serves": (Query(channel=stock.CHANNEL), NEWEST),
    "what a channel serves by version": (Query(channel=stock.CHANNEL), VERSION),
    "what a channel serves by score": (Query(channel=stock.CHANNEL), "sql-exact.accuracy"),
    "words of all": (Query(text="train ticket"), NEWEST),
    "words of few": (Query(text="adapter 17 tickets"), NEWEST),
    "a run that is stated": (Query(provenance=("run_url:https://runs.example/170",)), NEWEST),
    "one repository by version": (Query(repository=RepositoryName("team-0", "adapter-17")), VERSION),
}
OF_WORDS: dict[str, tuple[Query, str]] = {
    "one in ten": (Query(text="tenth"), NEWEST),
    "one in fifty": (Query(text="fiftieth"), NEWEST),
    "one in fifty, of a base": (Query(text="fiftieth", base=BASE), NEWEST),
    "one in a hundred": (Query(text="hundredth"), NEWEST),
    "the oldest fiftieth": (Query(text="oldest"), NEWEST),
    "the oldest fiftieth, by version": (Query(text="oldest"), VERSION),
    "the oldest fiftieth, by score": (Query(text="oldest"), "sql-exact.accuracy"),
    "the older half": (Query(text="older"), NEWEST),
    "one in fifty of the older half": (Query(text="older fiftieth"), NEWEST),
    "none": (Query(text="nowhere"), NEWEST),
    "two words, each of every second": (Query(text="odd even"), NEWEST),
}
OF_A_READER: dict[str, tuple[Query, str]] = {
    "everything": (Query(), NEWEST),
    "a base": (Query(base=BASE), NEWEST),
    "a base by version": (Query(base=BASE), VERSION),
    "a base by score": (Query(base=BASE), "sql-exact.accuracy"),
    "base, rank, targets": (FITTING, NEWEST),
    "base, rank, targets: nothing fits": (Query(base=BASE, max_rank=3), NEWEST),
    "words of all": (Query(text="train ticket"), NEWEST),
    "one in fifty": (Query(text="fiftieth"), NEWEST),
    "a namespace of somebody else": (Query(namespace="team-1"), NEWEST),
}
OVER_HTTP: dict[str, dict[str, object]] = {
    "base, rank, targets": {"base": BASE, "max_rank": 16, "targets_within": "q_proj,v_proj", "limit": LIMIT},
    "nothing fits": {"base": BASE, "max_rank": 3, "targets_within": "q_proj,v_proj", "limit": LIMIT},
}


def main() -> None:
    chosen = harness.options(__doc__, rounds=15)
    sizes, count, seconds = ((500, 2_000), 10, 0.5) if chosen.quick else (SIZES, 40, 2.0)
    harness.announce("search", "sqlalchemy", "fastapi", "uvicorn", "psycopg")
    with TemporaryDirectory(prefix="bench-search-") as directory, ExitStack() as stack:
        home = Path(directory)
        urls = {size: stack.enter_context(stock.databases(home, chosen.postgres, chosen.base, size)) for size in sizes}
        for kind in urls[sizes[0]]:
            opened = {size: stack.enter_context(closing(Database(urls[size][kind]))) for size in sizes}
            for size, database in opened.items():
                _sow(database, size)
            _verbs(kind, opened, (HOST, QUERIES), LIMIT, count, chosen.rounds)
            _verbs(kind, opened, (HOST, OF_WORDS), SHORT, max(2, count // 4), chosen.rounds)
            _verbs(kind, opened, (OF_THE_OLDEST, OF_A_READER), SHORT, max(2, count // 4), chosen.rounds)
            with ExitStack() as servers:
                ports = {size: resolve.adaptory(urls[size][kind], home, servers) for size in sizes}
                _throughput(kind, ports, max(2, chosen.rounds // 3), seconds)


def _sow(database: Database, releases: int) -> None:
    with database.write() as session:
        for word, has in SOWN.items():
            numbers = [number for number in range(1, releases + 1) if has(number, releases)]
            session.execute(insert(ReleaseWord), [{"word": word, "release_id": number} for number in numbers])
    with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("ANALYZE" if database.is_sqlite else "VACUUM ANALYZE"))


def _verbs(
    kind: str,
    opened: Mapping[int, Database],
    asking: tuple[Actor, Mapping[str, tuple[Query, str]]],
    limit: int,
    count: int,
    rounds: int,
) -> None:
    actor, queries = asking
    cases: dict[str, Case] = {
        f"{name}, {size:,}": partial(harness.calls, partial(_page, database, actor, *asked, limit), count)
        for name, asked in queries.items()
        for size, database in opened.items()
    }
    results = harness.interleave(cases, rounds)
    small, large = opened
    rows = [["query", "found", f"ms at {small:,}", f"ms at {large:,}", "times"]]
    for name, asked in queries.items():
        few, many = results[f"{name}, {small:,}"], results[f"{name}, {large:,}"]
        hits = "/".join(str(len(_page(database, actor, *asked, limit))) for database in opened.values())
        times = [one.seconds / other.seconds for one, other in zip(many, few, strict=True)]
        milliseconds = [harness.spread([sample.seconds * 1e3 for sample in samples]) for samples in (few, many)]
        rows.append([name, hits, *milliseconds, harness.spread(times)])
    harness.table(
        f"{kind}: a page of {limit} as documents for the {actor.name}, in process ({rounds} rounds of {count})", rows
    )
    print(f"load average {os.getloadavg()[0]:.1f}")


def _page(database: Database, actor: Actor, query: Query, order: str, limit: int) -> list[object]:
    with database.read() as session:
        hits = search.search(session, actor, query, Order(order, limit + 1)).hits[:limit]
        return [release_document(actor, details) for details in load_details(session, [hit.release_id for hit in hits])]


def _throughput(kind: str, ports: Mapping[int, int], rounds: int, seconds: float) -> None:
    rows = [["query", *(f"requests/s at {size:,}" for size in ports), "share"]]
    for name, asked in OVER_HTTP.items():
        request = load.get(f"/v1/releases?{urlencode(asked)}")
        rates: dict[int, list[float]] = {size: [] for size in ports}
        for number in range(rounds + 1):
            for size in sorted(ports, reverse=bool(number % 2)):
                rate = load.requests_per_second(ports[size], request, CLIENTS, seconds)
                if number:
                    rates[size].append(rate)
        small, large = rates.values()
        shares = [one / other for one, other in zip(large, small, strict=True)]
        rows.append([name, harness.spread(small), harness.spread(large), harness.spread(shares)])
    harness.table(f"{kind}: {CLIENTS} clients over HTTP, {seconds:g} s a round ({rounds} rounds)", rows)


if __name__ == "__main__":
    main()
