"""The database: `read()` and `write()`, the only commit, and the name of a constraint turned into an error."""

import fcntl
import logging
import re
import sqlite3
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any, cast

from sqlalchemy import (
    Connection,
    DateTime,
    Dialect,
    Engine,
    MetaData,
    TypeDecorator,
    create_engine,
    event,
    inspect,
    text,
)
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, InvalidRequestError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import DeclarativeBase, sessionmaker
from sqlalchemy.orm import Session as Session

from registry.errors import Conflict, Invalid, Unavailable
from registry.outages import OutageLog

outages = OutageLog(logging.getLogger(__name__))

SQLITE_POOL_SIZE = 40
_BLOBS_LOCK, _COLLECTION_LOCK = 0x424C4F42, 0x434F4C4C
"""Keys of PostgreSQL's advisory locks: between who relies on blobs and who collects them, and between collectors."""
UNIQUE_VIOLATION, READ_ONLY = "23505", "25006"
"""PostgreSQL's SQLSTATEs."""
_DROPPED_AGAIN = "This connection is closed"
"""SQLAlchemy's pool, where a connection that it made anew was dropped as well: there is no type for it."""
_SQLITE_MOST_S = 24 * 3600
MMAP_BYTES = 256 << 20
"""SQLite's own cache is 2 MB; reading through the page cache made a search over 10,000 releases 2 to 4 times faster."""


class UtcDateTime(TypeDecorator[datetime]):
    """A moment in UTC, as which one without a zone is taken. SQLite forgets the zone of a timestamp: it is sent in UTC,
    and put back when a row is read."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None or value.tzinfo is UTC:
            return value
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value.replace(tzinfo=UTC) if value is not None and value.tzinfo is None else value


class Row(DeclarativeBase):
    """Every table; the naming convention gives each constraint the name that migrations use."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


@dataclass(frozen=True, slots=True)
class Patience:
    """How many seconds PostgreSQL may take to let us in, and any database for one statement, its locks included.

    `statement_s` is None for work that takes as long as it takes.
    """

    connect_s: int = 5
    statement_s: float | None = 30.0


class _Reading(Session):
    """Of one connection, on which nothing is begun until rows are to be objects: a transaction of SQLAlchemy takes
    longer to begin and to end than most of what is asked."""

    def connection(self, *_: Any, **__: Any) -> Connection:
        return cast(Connection, self.bind)

    def close(self) -> None:
        if self.in_transaction():  # else it has no objects
            super().close()


class Database:
    """An engine and its two doors. A `Session` never leaves the `with` block that opened it."""

    def __init__(self, url: str, patience: Patience = Patience(), pool_size: int = 20) -> None:
        """`pool_size` is the most connections to PostgreSQL that are open at a time."""
        self.url: URL = make_url(url)
        self.reading: Engine = (
            _sqlite(self.url, patience) if self.is_sqlite else _postgresql(self.url, patience, pool_size)
        )
        transactions = {} if self.is_sqlite else {"isolation_level": "READ COMMITTED"}
        self.engine: Engine = self.reading.execution_options(**transactions)
        self._sessions = sessionmaker(self.engine, expire_on_commit=False)
        self._turn = Lock()
        self._longest_turn_s = _sqlite_wait_s(patience)

    @property
    def is_sqlite(self) -> bool:
        return self.url.get_backend_name() == "sqlite"

    @contextmanager
    def read(self) -> Generator[Session]:
        """Reads, and writes nothing. Rows keep what was loaded of them. Each statement may see a moment of its own.

        PostgreSQL is spared BEGIN and ROLLBACK, two of a resolve's three round trips; and whoever wants no objects is
        spared SQLAlchemy's part of it.
        """
        with _told(), self.reading.connect() as connection, _Reading(connection, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def snapshot(self) -> Generator[Session]:
        """A `read` whose statements all see one moment, as in any transaction of SQLite."""
        with _told(), self._sessions() as session:
            if not self.is_sqlite:
                session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
            yield session

    @contextmanager
    def write(self) -> Generator[Session]:
        """A transaction that is committed when the block ends and rolled back when it raises.

        On SQLite it begins IMMEDIATE: of 400 read-then-write transactions in four threads, 300 failed with "database is
        locked" under plain BEGIN, none under this. Its writers of one process wait for each other here, since SQLite's
        own waiting is to look again after 1 to 100 ms: eight clients were slower together than one alone.
        """
        with _told(), self._writing(), self._sessions() as session:
            if self.is_sqlite:
                session.connection(execution_options={"begin": "IMMEDIATE"})
            yield session
            session.commit()

    @contextmanager
    def _writing(self) -> Generator[None]:
        if not self.is_sqlite:
            yield
            return
        if not self._turn.acquire(timeout=self._longest_turn_s):
            raise Unavailable("database_busy", "Another change takes too long.", next_step="Try again in a moment.")
        try:
            yield
        finally:
            self._turn.release()

    def close(self) -> None:
        self.engine.dispose()


def insert_if_absent(session: Session, table: type[Row], **values: Any) -> bool:
    """Adds a row unless one with the same key is there: for facts that two writers may state at the same moment. Did
    it? Another transaction that adds the same now is waited for."""
    if session.get_bind().dialect.name == "sqlite":
        from sqlalchemy.dialects.sqlite import insert
    else:
        from sqlalchemy.dialects.postgresql import insert
    key: Any = inspect(table).primary_key[0]
    # What is returned tells it: PostgreSQL's driver counts no rows of such an insert.
    added = session.execute(insert(table).values(**values).on_conflict_do_nothing().returning(key))
    return added.first() is not None


@contextmanager
def only_collection(database: Database) -> Generator[None]:
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
    with _told(), database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        key = {"key": _COLLECTION_LOCK}
        if not connection.scalar(text("SELECT pg_try_advisory_lock(:key)"), key):
            raise _collecting()
        try:
            yield
        finally:
            connection.execute(text("SELECT pg_advisory_unlock(:key)"), key)


def _collecting() -> Conflict:
    return Conflict("collecting", "Another collection is running.", next_step="Wait until it has ended.")


def rely_on_blobs(session: Session) -> None:
    """Until this transaction ends no collection begins: for whoever comes to rely on blobs that are there.

    Row locks would not do: a reference takes one that does not conflict with what a collection writes. On SQLite there
    is one writer at a time anyway.
    """
    _advisory_lock(session, "pg_advisory_xact_lock_shared")


def collect_blobs(session: Session) -> None:
    """Until this transaction ends nobody comes to rely on a blob; waits for those who are about to."""
    _advisory_lock(session, "pg_advisory_xact_lock")


def _advisory_lock(session: Session, function: str) -> None:
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text(f"SELECT {function}(:key)"), {"key": _BLOBS_LOCK})


def _sqlite_wait_s(patience: Patience) -> float:
    return _SQLITE_MOST_S if patience.statement_s is None else patience.statement_s


def _sqlite(url: URL, patience: Patience) -> Engine:
    connect = {"check_same_thread": False, "timeout": _sqlite_wait_s(patience)}
    engine = create_engine(url, connect_args=connect, pool_size=SQLITE_POOL_SIZE, max_overflow=0)

    @event.listens_for(engine, "connect")
    def _prepare(connection: Any, _record: object) -> None:  # pyright: ignore[reportUnusedFunction]
        connection.isolation_level = None  # the driver would begin by itself, and never IMMEDIATE
        for pragma in (
            "journal_mode=WAL",
            "synchronous=FULL",
            "foreign_keys=ON",
            f"mmap_size={MMAP_BYTES}",
        ):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Any) -> None:  # pyright: ignore[reportUnusedFunction]
        mode = connection.get_execution_options().get("begin")
        if mode is None:  # waits for nothing, so that it cannot fail in a way that must be told
            connection.connection.execute("BEGIN")
        else:
            connection.exec_driver_sql(f"BEGIN {mode}")

    return engine


def _postgresql(url: URL, patience: Patience, pool_size: int) -> Engine:
    from registry.postgres import postgresql_engine  # psycopg is loaded where it is used

    return postgresql_engine(url, pool_size, patience.connect_s, patience.statement_s)


@contextmanager
def _told() -> Generator[None]:
    """Database errors leave as errors that a user can act on."""
    try:
        yield
    except IntegrityError as error:
        table = _doubled(error)
        if table is None:
            raise
        raise Conflict(
            "raced",
            f"Somebody else has just added the same to {table.replace('_', ' ')}.",
            subject=table,
            next_step="Run the command again.",
        ) from error
    except DataError as error:
        raise Invalid(
            "bad_value",
            "A value does not fit its column: a text is too long or has a NUL, or a number is too large.",
            next_step="Correct the value and repeat.",
        ) from error
    except PoolTimeout as error:
        raise Unavailable(
            "database_busy",
            "All connections of this process to the database are in use (ADAPTORY_DATABASE_POOL_SIZE).",
            next_step="Try again in a moment.",
        ) from error
    except InvalidRequestError as error:
        if error.args[:1] != (_DROPPED_AGAIN,):
            raise
        outages.warn("The database cannot be used", error)
        raise Unavailable(
            "database_unavailable", "The database drops its connections.", next_step="Try again; see that it runs."
        ) from error
    except OperationalError as error:
        raise _away(error) from error
    except DBAPIError as error:
        if error.connection_invalidated or getattr(error.orig, "sqlstate", None) == READ_ONLY:
            outages.warn("The database cannot be used", error.orig)
            raise Unavailable(
                "database_unavailable",
                "The database cannot be used.",
                next_step="Try again; if it stays so, see that it runs and may be written.",
            ) from error
        raise


def _away(error: OperationalError) -> Unavailable:
    if _is_limit(error.orig):
        outages.warn("The database lets no more connections in", error.orig)
        return _no_connection_left()
    outages.warn("The database cannot be used", error.orig)
    return Unavailable(
        "database_unavailable",
        "The database cannot be used.",
        next_step="See that it runs, has space and is migrated.",
    )


def _is_limit(error: BaseException | None) -> bool:
    if isinstance(error, sqlite3.Error):
        return False
    from registry.postgres import is_limit

    return is_limit(error)


def _no_connection_left() -> Unavailable:
    return Unavailable(
        "database_connections",
        "PostgreSQL lets no more connections in: its max_connections, or the limit of the user or the database, is "
        "reached.",
        next_step="Try again in a moment. If it stays so, lower ADAPTORY_DATABASE_POOL_SIZE or --processes, or raise "
        "max_connections.",
    )


def _doubled(error: IntegrityError) -> str | None:
    """The table that has such a row already; None when it is another constraint that broke."""
    if getattr(error.orig, "sqlstate", None) == UNIQUE_VIOLATION:
        diagnosis: Any = getattr(error.orig, "diag", None)
        return str(diagnosis.table_name)
    match = re.match(r"UNIQUE constraint failed: (\w+)", str(error.orig))
    return match and match.group(1)


def migrations_directory() -> Path:
    """Inside the installed package, or at the top of a source checkout."""
    here = Path(__file__).resolve().parent
    installed = here / "migrations"
    return installed if installed.is_dir() else here.parent / "migrations"


@cache
def head_revision() -> str:
    """The newest migration when this process first asked: a newer version may be installed beneath it since. A file is
    named `0001_what.py` and its revision is the number."""
    return max(path.name.split("_")[0] for path in (migrations_directory() / "versions").glob("[0-9]*_*.py"))


def schema_revision(database: Database) -> str | None:
    """None for a database without our tables."""
    with _told():
        if not inspect(database.engine).has_table("alembic_version"):
            return None
    with database.read() as session:
        return session.scalar(text("SELECT version_num FROM alembic_version"))


def migrate(database: Database, revision: str = "head") -> None:
    """Runs the migrations up to `revision`; a second process doing the same waits and finds nothing left to do.

    Raises Unavailable for a database that a newer version has migrated.
    """
    from alembic import command
    from alembic.config import Config

    _refuse_newer(schema_revision(database))
    config = Config()
    config.set_main_option("script_location", str(migrations_directory()).replace("%", "%%"))
    config.attributes["engine"] = database.engine
    with _told():
        command.upgrade(config, revision)


def ensure_schema(database: Database, *, create: bool) -> None:
    """Refuses a database of another schema; with `create`, an empty one is made ready."""
    found, head = schema_revision(database), head_revision()
    if found is None and create:
        migrate(database)
    elif found is None or found < head:
        raise Unavailable(
            "schema_old",
            f"The database is at schema {found or 'none'}, this version needs {head}.",
            next_step="Run `adaptory migrate`.",
        )
    _refuse_newer(found)


def _refuse_newer(found: str | None) -> None:
    if found is not None and found > (head := head_revision()):
        raise Unavailable(
            "schema_new",
            f"The database is at schema {found}, newer than {head}.",
            next_step="Install a newer adaptory, or restart what runs if that is done.",
        )
