"""Locks between processes: for pushes and collections within a transaction, for collections and probes longer."""

import fcntl
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from hashlib import sha256
from pathlib import Path

from sqlalchemy import text
from sqlalchemy.orm import Session as Session

from registry.database.engine import Database
from registry.database.errors import translate_database_errors
from registry.errors import Conflict

_BLOBS_LOCK, _COLLECTION_LOCK, _PROBE_LOCK, _SEALING_LOCK = 0x424C4F42, 0x434F4C4C, 0x50524F42, 0x5345414C
"""Keys of PostgreSQL's advisory locks: between pushes and collections, between collections, between probes, and
between those who seal the audit log."""
_FLEET_LOCKS = 0x464C5445
"""The first half of the keys of the fleets' locks, one of each namespace."""


def exclusive_collection(database: Database) -> AbstractContextManager[None]:
    """Holds the lock for a collection of blobs, or for a backup: one at a time, on all machines. Raises Conflict if
    another is running. A second collection would treat the first one's marked blobs as leftovers of a dead one, and
    remove bytes that were sent again meanwhile. During a backup, it would remove blobs that are still to be copied.
    """
    running = Conflict("collecting", "Another collection or a backup is running.", next_step="Wait until it ends.")
    return _process_lock(database, "collecting", _COLLECTION_LOCK, running)


def exclusive_probe(database: Database) -> AbstractContextManager[None]:
    """Holds the lock for probing a store: one probe at a time, on all machines. Waits for another one to end."""
    return _process_lock(database, "probing", _PROBE_LOCK, None)


@contextmanager
def _process_lock(database: Database, name: str, key: int, refusal: Conflict | None) -> Generator[None]:
    """A lock that ends with the process that holds it. Raises `refusal` if it is taken; waits if `refusal` is None."""
    if database.is_sqlite:
        with Path(f"{database.url.database}.{name}").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if refusal else 0))
            except BlockingIOError:
                if refusal is None:
                    raise
                raise refusal from None
            yield
        return
    with (
        translate_database_errors(),
        database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection,
    ):
        if refusal is None:
            connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": key})
        elif not connection.scalar(text("SELECT pg_try_advisory_lock(:key)"), {"key": key}):
            raise refusal
        try:
            yield
        finally:
            connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": key})


def lock_blobs_shared(session: Session) -> None:
    """Prevents collections from starting until this transaction ends, for callers that rely on existing blobs. Row
    locks are not enough: a foreign key takes one that does not conflict with a collection's writes. SQLite has one
    writer at a time anyway.
    """
    _advisory_lock(session, "pg_advisory_xact_lock_shared")


def lock_blobs_exclusive(session: Session) -> None:
    """Prevents new uses of blobs until this transaction ends. Waits for transactions that are adding some."""
    _advisory_lock(session, "pg_advisory_xact_lock")


def lock_sealing(session: Session) -> None:
    """Lets one process at a time seal rows of the audit log, until its transaction ends."""
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _SEALING_LOCK})


def lock_fleet(session: Session, namespace: str) -> None:
    """Makes reports of nodes of the namespace that count others wait for each other, until the transaction ends."""
    if session.get_bind().dialect.name == "postgresql":
        key = int.from_bytes(sha256(namespace.encode()).digest()[:4], signed=True)
        session.execute(text("SELECT pg_advisory_xact_lock(:kind, :key)"), {"kind": _FLEET_LOCKS, "key": key})


def _advisory_lock(session: Session, function: str) -> None:
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text(f"SELECT {function}(:key)"), {"key": _BLOBS_LOCK})
