"""Answers of both databases to a prepared statement: the same texts, whatever they store internally."""

import gc
import traceback
from collections.abc import Generator
from datetime import UTC, datetime
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Column, Float, MetaData, Select, String, Table, bindparam, event, insert, select, text
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.orm import Session

from registry.database.dialects import (
    PLANNED_VALUES,
    float_text,
    in_list,
    in_subquery,
    json_list,
    json_rows,
    padded,
    timestamp_text,
)
from registry.database.engine import Database, UtcDateTime
from registry.database.prepared import Prepared, prepared
from registry.database.tables.catalog import Id, Release
from registry.domain.catalog.release_rows import BATCH_SIZE, load_details
from registry.domain.catalog.suites import scores_of
from registry.errors import Unavailable
from tests.registry.shelf import stock

THINGS = Table(
    "things",
    MetaData(),
    Column("id", Id, primary_key=True),
    Column("name", String(50)),
    Column("value", Float),
    Column("at", UtcDateTime),
)
NAMES = ("plain", 'with "quotes"', "a,b", "größe", "{}", "")


@pytest.fixture(scope="module")
def database(migrated: Database) -> Database:
    THINGS.create(migrated.engine)
    return migrated


@pytest.fixture
def session(database: Database) -> Generator[Session]:
    """A session of a transaction that is not committed."""
    with database.snapshot() as opened:
        yield opened


def keep(session: Session, **columns: Any) -> None:
    session.execute(insert(THINGS).values(**columns))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=st.floats(allow_nan=False, allow_infinity=False))
def test_a_float_reads_back_as_the_same_number(database: Database, value: float) -> None:
    parameter: Any = bindparam("value", type_=Float())
    with database.read() as session:
        [[read]] = Prepared(select(float_text(parameter))).rows(session, {"value": value})
    assert float(read) == value


def test_a_float_that_is_not_there_stays_so(session: Session) -> None:
    keep(session, id=1, value=None)
    assert Prepared(select(float_text(THINGS.c.value))).column(session, {}) == [None]


@pytest.mark.parametrize(
    ("at", "expected"),
    [
        (datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), "2026-01-02T03:04:05Z"),
        (datetime(2026, 1, 2, 3, 4, 5, 120_000, tzinfo=UTC), "2026-01-02T03:04:05.120000Z"),
        (datetime(2026, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC), "2026-12-31T23:59:59.999999Z"),
    ],
)
def test_a_moment_is_written_in_utc_as_documents_have_it(
    database: Database, session: Session, at: datetime, expected: str
) -> None:
    keep(session, id=1, at=at)
    if not database.is_sqlite:
        session.execute(text("SET LOCAL TIME ZONE 'Asia/Kathmandu'"))
    assert Prepared(select(timestamp_text(THINGS.c.at))).column(session, {}) == [expected]
    assert orjson.dumps(at, option=orjson.OPT_UTC_Z) == f'"{expected}"'.encode()


def test_a_list_of_values_finds_those_and_no_others(session: Session) -> None:
    for number, name in enumerate(NAMES):
        keep(session, id=number, name=name)
    by_name = Prepared(select(THINGS.c.id).where(in_list(THINGS.c.name, "names")).order_by(THINGS.c.id))
    assert by_name.column(session, {"names": [NAMES[1], NAMES[3], NAMES[5], "nobody"]}) == [1, 3, 5]
    assert by_name.column(session, {"names": []}) == []
    by_number = Prepared(select(THINGS.c.name).where(in_list(THINGS.c.id, "ids"), THINGS.c.name != bindparam("but")))
    assert by_number.column(session, {"ids": padded([2, 4, 99]), "but": "{}"}) == ["a,b"]


def test_rows_come_as_one_text(session: Session) -> None:
    rows, names = Prepared(select(json_rows(THINGS.c.id, THINGS.c.name))), Prepared(select(json_list(THINGS.c.name)))
    assert [orjson.loads(text or "[]") for text in rows.column(session, {})] == [[]]
    for number, name in enumerate(NAMES):
        keep(session, id=number, name=name)
    assert [sorted(orjson.loads(text)) for text in rows.column(session, {})] == [
        [[number, name] for number, name in enumerate(NAMES)]
    ]
    assert [sorted(orjson.loads(text)) for text in names.column(session, {})] == [sorted(NAMES)]


@pytest.mark.parametrize(("highest", "expected"), [(-1, []), (0, [0]), (2, [0, 1, 2])])
def test_values_of_other_rows_find_those_and_no_others(session: Session, highest: int, expected: list[int]) -> None:
    for number, name in enumerate(NAMES):
        keep(session, id=number, name=name)
    low = THINGS.alias()
    those = in_subquery(THINGS.c.id, select(low.c.id).where(low.c.id <= bindparam("highest")))
    assert (
        Prepared(select(THINGS.c.id).where(those).order_by(THINGS.c.id)).column(session, {"highest": highest})
        == expected
    )


@pytest.mark.parametrize("count", [0, 1, PLANNED_VALUES - 1, PLANNED_VALUES, PLANNED_VALUES + 1])
def test_a_list_is_filled_with_its_own_values(count: int) -> None:
    values = list(range(count))
    assert set(padded(values)) == set(values)
    assert len(padded(values)) == (max(count, PLANNED_VALUES) if count else 0)


@pytest.mark.long
def test_more_releases_than_one_statement_takes_come_in_the_order_asked_for(database: Database) -> None:
    ids = [item.id for item in reversed(stock(database, count=BATCH_SIZE + 10))]
    assert len(ids) > BATCH_SIZE
    with database.read() as session:
        details = load_details(session, ids)
        kept = {number: scores_of(session, session.get_one(Release, number)) for number in ids}
        assert load_details(session, []) == []
    assert [detail.release.id for detail in details] == ids
    shown = {detail.release.id: [(*row[1:3], float(row[4]), row[6]) for row in detail.scores] for detail in details}
    assert any(shown.values())
    assert shown == {
        number: [(score.suite.name, score.metric, score.value, score.n) for score in scores]
        for number, scores in kept.items()
    }


@pytest.mark.long
def test_of_a_statement_that_was_compiled_only_its_text_is_kept(session: Session) -> None:
    """Thousands of forms of searches took a gigabyte, and garbage collection took ten seconds."""
    above = prepared(lambda number: select(THINGS.c.id).where(THINGS.c.id > number).order_by(THINGS.c.id))
    for number in (1, 2, 3):
        keep(session, id=number, name="")
    assert [above(number).column(session, {}) for number in (0, 1)] == [[1, 2, 3], [2, 3]]
    gc.collect()
    before = statements_in_memory()
    for number in range(2, 40):
        above(number).rows(session, {})
    assert above(1) is above(1)
    gc.collect()
    assert statements_in_memory() <= before


def statements_in_memory() -> int:
    return sum(type(kept) is Select for kept in gc.get_objects())


@pytest.mark.parametrize("door", ["read", "write"])
def test_connections_that_drop_as_soon_as_they_are_made_are_a_database_that_is_away(
    migrated: Database, door: str
) -> None:
    def drop(*_: object) -> None:
        raise DisconnectionError

    event.listen(migrated.reading, "checkout", drop)
    try:
        with pytest.raises(Unavailable) as caught, getattr(migrated, door)() as session:
            session.execute(text("SELECT 1"))
        assert caught.value.code == "database_unavailable"
    finally:
        event.remove(migrated.reading, "checkout", drop)


def test_errors_of_the_database_do_not_repeat_a_secret(database: Database) -> None:
    for values in ({"until": "no time"}, {"webhook_id": None}, {"webhook_id": "x" * 3000}):
        rows = {"webhook_id": "unknown", "secret": "whsec_do_not_log", "until": None} | values
        with pytest.raises(Exception, match=r"\S") as raised, database.write() as session:
            session.execute(
                text("INSERT INTO webhook_secrets (webhook_id, secret, until) VALUES (:webhook_id, :secret, :until)"),
                rows,
            )
        assert "whsec_do_not_log" not in "".join(traceback.format_exception(raised.value)), values
