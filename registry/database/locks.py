"""Transaction locks: shared by pushes, exclusive for collections."""

import fcntl
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import (
    text,
)
from sqlalchemy.orm import Session as Session

from registry.database.engine import Database
from registry.database.errors import translate_database_errors
from registry.errors import Conflict

_BLOBS_LOCK, _COLLECTION_LOCK = 0x424C4F42, 0x434F4C4C
"""Keys of PostgreSQL's advisory locks: between who relies on blobs and who collects them, and between collectors."""


@contextmanager
def exclusive_collection(database: Database) -> Generator[None]:
    """One collection of blobs at a time, on all machines; the lock ends with the process that holds it.

    Two would take each other's marked blobs for those of a dead one, and remove bytes that came again meanwhile.
    """
    if database.is_sqlite:
        with Path(f"{database.url.database}.collecting").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise _collecting() from None
            yield
        return
    with (
        translate_database_errors(),
        database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection,
    ):
        key = {"key": _COLLECTION_LOCK}
        if not connection.scalar(text("SELECT pg_try_advisory_lock(:key)"), key):
            raise _collecting()
        try:
            yield
        finally:
            connection.execute(text("SELECT pg_advisory_unlock(:key)"), key)


def _collecting() -> Conflict:
    return Conflict("collecting", "Another collection is running.", next_step="Wait until it ends.")


def lock_blobs_shared(session: Session) -> None:
    """No collection begins until this transaction ends: for callers that rely on existing blobs.

    Row locks would not do: a reference takes one that does not conflict with what a collection writes. On SQLite there
    is one writer at a time anyway.
    """
    _advisory_lock(session, "pg_advisory_xact_lock_shared")


def lock_blobs_exclusive(session: Session) -> None:
    """Until this transaction ends nobody comes to rely on a blob; waits for those who are about to."""
    _advisory_lock(session, "pg_advisory_xact_lock")


def _advisory_lock(session: Session, function: str) -> None:
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text(f"SELECT {function}(:key)"), {"key": _BLOBS_LOCK})
