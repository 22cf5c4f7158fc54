"""The query plans of a search and a resolve on both databases: no statement reads a complete table that grows with
releases. The plans are those of a registry with thousands of releases whose statistics the database knows. Interned
tables (traits, target sets), small ones (bases, suites) and those empty here (lineage) may be read completely;
PostgreSQL also reads a table of a few pages completely, as it should: here those with a row for each repository."""

import re
import sqlite3
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Self

import psycopg
import pytest
from psycopg import sql

from benchmarks import stock
from composer.formats.adapters.serving import ServerProfile
from registry.api.routes import views
from registry.api.routes.documents import RenderedReleaseCache
from registry.database.engine import Database, Session
from registry.domain.access.audit import Actor
from registry.domain.access.roles import EVERYWHERE
from registry.domain.catalog import bases, release_rows
from registry.domain.catalog.suites import Condition
from registry.domain.channels import resolve
from registry.domain.search import search
from registry.domain.search.ordering import VERSION, Order, Position
from registry.domain.search.query import Query
from registry.formats.references import RepositoryName, parse_reference
from tests import services
from tests.composer.small_model import save_llama
from tests.registry.searches import plain_search

pytestmark = pytest.mark.on("PostgreSQL")  # 10,000 releases take half of the CPU that they take on SQLite
RELEASES = 10_000
WITH_RELEASES = ("release_words", "releases", "revisions", "scores")
WITH_REPOSITORIES = ("channels", "moves", "repositories")
NOW = datetime(2026, 2, 1, tzinfo=UTC)
HOST = Actor("host", NOW, {EVERYWHERE: "admin"})
READER = Actor("reader", NOW, {"team-1": "reader"})
BASE = stock.BASES[0]
ACCURATE = Condition("sql-exact", "accuracy", ">=", 0.5)
FITTING = Query(base=BASE, max_rank=16, targets_within=("q_proj", "v_proj"))


@dataclass(frozen=True)
class Stocked:
    database: Database
    name: str

    def plans(self, ask: Any) -> list[tuple[str, list[str]]]:
        """The text and plan of each statement that `ask(session)` sends."""
        with self.database.read() as session:
            sent = _overheard(session.connection().connection.driver_connection)
            ask(session)
            _unheard(session.connection().connection.driver_connection)
        asked = [(text, given) for text, given in sent if text.startswith(("SELECT", "WITH"))]
        assert asked
        explain = _sqlite_plan if self.database.is_sqlite else _kept_plan
        with self.database.read() as session:
            driver = session.connection().connection.driver_connection
            return [(text, explain(driver, text, given)) for text, given in asked]

    def steps(self, ask: Any) -> int:
        """The number of instructions that SQLite runs for `ask(session)`, rounded to hundreds."""
        counted: list[None] = []
        with self.database.read() as session:
            driver: Any = session.connection().connection.driver_connection
            driver.set_progress_handler(lambda: counted.append(None), 100)
            ask(session)
            driver.set_progress_handler(None, 0)
        return 100 * len(counted)

    def scanned_tables(self, plan: Sequence[str], *, in_order: bool) -> list[str]:
        """Lines of a plan that read a whole growing table. In its order one may be, where a page soon is full."""
        growing = (*WITH_RELEASES, *WITH_REPOSITORIES) if self.database.is_sqlite else WITH_RELEASES
        pattern = r"\bSCAN (\w+)" if self.database.is_sqlite else r"\bSeq Scan on (\w+)"
        ordered = self.database.is_sqlite and not any("TEMP B-TREE FOR ORDER BY" in line for line in plan)
        tables: list[str] = []
        for line in plan:
            match = re.search(pattern, line)
            if match and re.sub(r"_\d+$", "", match.group(1)) in growing and not (in_order and ordered):
                tables.append(line)
        return tables


def _overheard(driver: Any) -> list[tuple[str, Any]]:
    """Collects the statements sent over a driver's connection from now on: SQLAlchemy does not see all of them."""
    sent: list[tuple[str, Any]] = []
    if isinstance(driver, sqlite3.Connection):  # tells statements with their values in place
        driver.set_trace_callback(lambda statement: sent.append((statement, ())))
        return sent

    class Overheard(psycopg.Cursor[Any]):
        def execute(self, query: Any, params: Any = None, **options: Any) -> Self:
            sent.append((query, params))
            return super().execute(query, params, **options)

    driver.cursor_factory = Overheard
    return sent


def _sqlite_plan(driver: Any, text: str, given: Any) -> list[str]:
    return [str(row[-1]) for row in driver.execute(f"EXPLAIN QUERY PLAN {text}", given)]


def _kept_plan(driver: Any, text: str, given: Any) -> list[str]:
    """The plan for any values, which PostgreSQL may keep: an EXPLAIN of the statement itself shows that for these."""
    names = list(dict.fromkeys(re.findall(r"%\((\w+)\)s", text)))
    for number, name in enumerate(names, 1):
        text = text.replace(f"%({name})s", f"${number}")
    driver.execute("SET plan_cache_mode = force_generic_plan")
    driver.execute(f"PREPARE explained AS {text}")
    values = sql.SQL(", ").join(sql.Literal(given[name]) for name in names)
    called = sql.SQL("EXECUTE explained ({})").format(values) if names else sql.SQL("EXECUTE explained")
    plan = [str(line) for [line] in driver.execute(sql.SQL("EXPLAIN {}").format(called))]
    driver.execute("DEALLOCATE explained")
    driver.execute("RESET plan_cache_mode")
    return plan


def _unheard(driver: Any) -> None:
    if isinstance(driver, sqlite3.Connection):
        driver.set_trace_callback(None)
    else:
        driver.cursor_factory = psycopg.Cursor


@pytest.fixture(scope="module", params=services.DATABASES)
def stocked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Generator[Stocked]:
    directory = tmp_path_factory.mktemp("stocked")
    database = Database(services.new_database_of(request.param, directory, migrated=True))
    stock.fill(database, save_llama(directory / "base"), RELEASES)
    yield Stocked(database, request.param)
    database.close()


NARROW: dict[str, tuple[Query, Order]] = {
    "what fits": (FITTING, Order()),
    "what fits, the next page": (FITTING, Order(after=Position(None, 5_000))),
    "what fits and loads": (
        Query(base=BASE, loads_in=ServerProfile("vllm", 8), targets_exact=("q_proj", "v_proj")),
        Order(),
    ),
    "what fits, by version": (FITTING, Order(VERSION)),
    "what fits, by score": (FITTING, Order("sql-exact.accuracy")),
    "what fits, by score, the next page": (FITTING, Order("sql-exact.accuracy", after=Position(0.9, 5_000))),
    "what fits and scores": (
        Query(base=BASE, max_rank=8, targets_exact=("q_proj", "v_proj"), score=(ACCURATE,)),
        Order(),
    ),
    "two scores, by one of them": (
        Query(score=(Condition("sql-exact", "accuracy", ">=", 0.3), Condition("sql-exact", "nll", "<=", 0.2))),
        Order("sql-exact.nll"),
    ),
    "what nothing fits": (Query(base=BASE, max_rank=3), Order()),
    "what scores as nothing does": (Query(base=BASE, score=(Condition("sql-exact", "accuracy", ">=", 2.0),)), Order()),
    "a repository": (Query(repository=RepositoryName("team-1", "adapter-26")), Order(VERSION)),
    "a namespace that is not there": (Query(namespace="nowhere"), Order()),
    "a channel that is not there": (Query(channel="nowhere"), Order()),
    "what a channel serves, by version": (Query(channel=stock.CHANNEL), Order(VERSION)),
    "what a channel serves for a base, by score": (Query(channel=stock.CHANNEL, base=BASE), Order("sql-exact.nll")),
    "rare words": (Query(text="adapter 499"), Order()),
    "words of old releases": (Query(text="adapter 2"), Order()),
    "words of old releases, the next page": (Query(text="adapter 2"), Order(after=Position(None, 4_500))),
    "words of old releases for a base": (Query(text="adapter 2", base=BASE, max_rank=16), Order()),
    "a run that is stated": (Query(provenance=("run_url:https://runs.example/170",)), Order()),
    "what a stranger may read": (Query(base=BASE), Order()),
    "everything that a stranger may read": (Query(), Order()),
    "everything that a stranger may read, the next page": (Query(), Order(after=Position(None, 700))),
    "everything that a stranger may read, by version": (Query(), Order(VERSION)),
    "everything that a stranger may read, by score": (Query(), Order("sql-exact.accuracy")),
    "words of all that a stranger may read": (Query(text="train ticket"), Order()),
    "an old namespace": (Query(namespace="team-1"), Order()),
}
BROAD: dict[str, tuple[Query, Order]] = {
    "everything": (Query(), Order()),
    "everything, the next page": (Query(), Order(after=Position(None, 5_000))),
    "everything by version": (Query(), Order(VERSION)),
    "a base": (Query(base=BASE), Order()),
    "a base by score": (Query(base=BASE), Order("sql-exact.nll")),
    "a channel": (Query(channel=stock.CHANNEL), Order()),
    "words of all": (Query(text="train ticket"), Order()),
    "words of all by version": (Query(text="train ticket"), Order(VERSION)),
    "words of all by score": (Query(text="train ticket"), Order("sql-exact.accuracy")),
    "a trainer of all": (Query(provenance=("trainer:TRL 0.20",)), Order()),
    "the latest": (Query(base=BASE, latest=True), Order()),
    "small files": (Query(max_size_bytes=1), Order()),
    "a score of many": (Query(score=(ACCURATE,)), Order()),
}


@pytest.mark.parametrize("name", NARROW)
def test_a_narrow_search_reads_no_whole_table(stocked: Stocked, name: str) -> None:
    query, order = NARROW[name]
    actor = READER if "stranger" in name else HOST
    for statement, plan in stocked.plans(lambda session: search.search(session, actor, query, order)):
        assert stocked.scanned_tables(plan, in_order=False) == [], "\n".join([statement, *plan])


@pytest.mark.parametrize("name", [name for name in NARROW if name.startswith("what fits") and "and scores" not in name])
def test_what_fits_is_found_by_an_index_of_traits(stocked: Stocked, name: str) -> None:
    plans = stocked.plans(lambda session: search.search(session, HOST, *NARROW[name]))
    lines = [line for _, plan in plans for line in plan if re.search(r"\b(Scan on|SCAN) traits", line)]
    assert not [line for line in lines if "ix_traits" not in line and "Bitmap Heap" not in line], plans
    assert any("ix_traits_base" in line for _, plan in plans for line in plan), plans


@pytest.mark.parametrize("name", BROAD)
def test_a_broad_search_reads_an_index_in_its_order_until_the_page_is_full(stocked: Stocked, name: str) -> None:
    query, order = BROAD[name]
    for statement, plan in stocked.plans(lambda session: search.search(session, HOST, query, order)):
        assert stocked.scanned_tables(plan, in_order=True) == [], "\n".join([statement, *plan])


@pytest.mark.parametrize("name", [*NARROW, *BROAD])
def test_a_search_finds_what_the_plain_statement_finds(stocked: Stocked, name: str) -> None:
    query, order = (NARROW | BROAD)[name]
    actor = READER if "stranger" in name else HOST
    with stocked.database.read() as session:
        first = search.search(session, actor, query, replace(order, after=None)).hits
        expected = plain_search(session, actor, query, order.name, not order.name.endswith("nll"))
    assert [hit.release_id for hit in first] == expected[: order.limit]


def test_a_page_is_read_by_its_ids(stocked: Stocked) -> None:
    for statement, plan in stocked.plans(lambda session: release_rows.load_details(session, list(range(7_000, 7_050)))):
        assert stocked.scanned_tables(plan, in_order=False) == [], "\n".join([statement, *plan])


def test_a_page_whose_documents_are_kept_costs_the_two_statements_of_its_search(stocked: Stocked) -> None:
    documents = RenderedReleaseCache()

    def ask(session: Session) -> None:
        page = search.search(session, HOST, FITTING, Order())
        documents.page(session, HOST, {hit.release_id: hit.stamp for hit in page.hits})

    assert [len(stocked.plans(ask)) for _ in range(2)] == [3, 2]


SHORT: dict[str, tuple[Actor, Query, Order, int]] = {
    "a run of an old release": (HOST, Query(provenance=("run_url:https://runs.example/170",)), Order(), 1_000),
    "a beginning of a hundred words of old releases": (HOST, Query(text="adapter 2"), Order(), 120_000),
    "what a stranger may read": (READER, Query(), Order(), 15_000),
    "what a channel serves, by version": (HOST, Query(channel=stock.CHANNEL), Order(VERSION), 50_000),
}
"""Counted in instructions, which are the same at each run: in the requested order alone they are 180,000 and more, or
80,000 for the stranger."""


@pytest.mark.long
@pytest.mark.parametrize("stocked", ["SQLite"], indirect=True)
@pytest.mark.parametrize("name", SHORT)
def test_sqlite_does_not_walk_past_the_new_releases_to_old_ones(stocked: Stocked, name: str) -> None:
    actor, query, order, most = SHORT[name]
    assert stocked.steps(lambda session: search.search(session, actor, query, order)) < most


@pytest.mark.parametrize("suffix", ["", "@prod", ":1.3.0", ":^1.2", "#{commit}"])
def test_a_resolve_reads_no_whole_table(stocked: Stocked, suffix: str) -> None:
    with stocked.database.read() as session:
        commit = _locate(session, f"{stock.repository_name(77)}:1.3.0").row.commit
    reference = f"{stock.repository_name(77)}{suffix.format(commit=commit[:9])}"
    for statement, plan in stocked.plans(lambda session: _locate(session, reference)):
        assert stocked.scanned_tables(plan, in_order=False) == [], "\n".join([statement, *plan])


def test_a_channel_is_resolved_with_one_statement(stocked: Stocked) -> None:
    assert len(stocked.plans(lambda session: _locate(session, f"{stock.repository_name(77)}@{stock.CHANNEL}"))) == 1


def _locate(session: Session, text: str) -> resolve.ResolvedRow:
    return resolve.locate(session, parse_reference(text))


def test_a_page_of_bases_is_four_more_statements_however_long_it_is(stocked: Stocked) -> None:
    def ask(session: Session) -> None:
        views.base_page(session, bases.list_page(session, after="", limit=50))

    assert len(stocked.plans(ask)) == 5
