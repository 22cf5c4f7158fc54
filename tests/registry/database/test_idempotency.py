"""Of requests under one key only one is performed, whichever comes first; and a key is kept for a week."""

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Barrier

import pytest

from registry.database.engine import Database
from registry.database.idempotency import (
    KEPT,
    Answer,
    IdempotentRequest,
    claim_key,
    expire_keys,
    find_answer,
    store_answer,
)
from registry.database.migrate import migrate
from registry.errors import Conflict
from tests import services

NOW = datetime(2026, 5, 1, tzinfo=UTC)
ASKED = IdempotentRequest("mia", "one", "a" * 64)


@pytest.fixture(params=services.DATABASES)
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Generator[Database]:
    opened = Database(services.new_database_of(request.param, tmp_path))
    migrate(opened)
    yield opened
    opened.close()


def made(database: Database, asked: IdempotentRequest, number: int) -> Answer:
    with database.write() as session:
        before = claim_key(session, asked, NOW)
        if before is not None:
            return before
        store_answer(session, asked, {"made": number})
        return {"made": number}


def test_of_many_at_once_one_is_done_and_all_get_its_answer(database: Database) -> None:
    together = Barrier(8)

    def ask(number: int) -> Answer:
        together.wait()
        return made(database, ASKED, number)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(8)))
    assert all(answer == answers[0] for answer in answers)
    with database.read() as session:
        assert find_answer(session, ASKED) == answers[0]


def test_what_failed_is_not_kept(database: Database) -> None:
    def fail() -> None:
        with database.write() as session:
            assert claim_key(session, ASKED, NOW) is None
            store_answer(session, ASKED, {"made": 1})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert made(database, ASKED, 2) == {"made": 2}


def test_a_key_is_its_users_and_of_one_request(database: Database) -> None:
    made(database, ASKED, 1)
    assert made(database, IdempotentRequest("ben", "one", "b" * 64), 2) == {"made": 2}
    with pytest.raises(Conflict, match="for another request"):
        made(database, IdempotentRequest("mia", "one", "b" * 64), 3)


def test_a_key_is_forgotten_after_a_week(database: Database) -> None:
    made(database, ASKED, 1)
    for later, kept in ((KEPT, True), (KEPT + timedelta(seconds=1), False)):
        with database.write() as session:
            expire_keys(session, NOW + later)
        with database.read() as session:
            assert (find_answer(session, ASKED) is not None) == kept
