"""The database engine: `read()`, `snapshot()` and `write()`, which contains the only commit."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
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
from sqlalchemy.orm import DeclarativeBase, sessionmaker
from sqlalchemy.orm import Session as Session

from registry.database.errors import translate_database_errors
from registry.errors import Unavailable

SQLITE_POOL_SIZE = 40
_SQLITE_MOST_S = 24 * 3600
MMAP_BYTES = 256 << 20
"""SQLite's own cache is 2 MB; with memory-mapped reads, a search over 10,000 releases was 2 to 4 times faster."""


class UtcDateTime(TypeDecorator[datetime]):
    """A timestamp in UTC; one without a zone is taken as UTC. SQLite does not store the zone, so it is added when a row
    is read."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None or value.tzinfo is UTC:
            return value
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value.replace(tzinfo=UTC) if value is not None and value.tzinfo is None else value


class Row(DeclarativeBase):
    """The base of all tables; its naming convention gives constraints the names that migrations use."""

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
class DatabaseTimeouts:
    """Timeouts in seconds: of connecting to PostgreSQL, and of one statement on any database, including its waits for
    locks. `statement_s` is None for work without a limit."""

    connect_s: int = 5
    statement_s: float | None = 30.0


class _ReadSession(Session):
    """A session on one connection that begins a transaction only when mapped objects are loaded: a transaction of
    SQLAlchemy takes longer to begin and end than most queries."""

    def connection(self, *_: Any, **__: Any) -> Connection:
        return cast(Connection, self.bind)

    def close(self) -> None:
        if self.in_transaction():  # else it has no objects
            super().close()


class Database:
    """An engine, its reads and its writes. A `Session` never leaves the `with` block that opened it."""

    def __init__(
        self, url: str, patience: DatabaseTimeouts = DatabaseTimeouts(), pool_size: int = 20, role: str = ""
    ) -> None:
        """`pool_size` is the maximum number of open connections to PostgreSQL; `role` is part of their name there."""
        self.url: URL = make_url(url)
        self.reading: Engine = (
            _sqlite(self.url, patience) if self.is_sqlite else _postgresql(self.url, patience, pool_size, role)
        )
        transactions = {} if self.is_sqlite else {"isolation_level": "READ COMMITTED"}
        self.engine: Engine = self.reading.execution_options(**transactions)
        self._sessions = sessionmaker(self.engine, expire_on_commit=False)
        self._turn = Lock()
        self._longest_turn_s = _sqlite_wait_s(patience)

    @property
    def shown_url(self) -> str:
        """The address for display, without the password and the query, which may have one too."""
        return self.url.set(query={}).render_as_string(hide_password=True)

    @property
    def is_sqlite(self) -> bool:
        return self.url.get_backend_name() == "sqlite"

    @contextmanager
    def read(self) -> Generator[Session]:
        """A read-only session. Rows keep what was loaded. Each statement may see a different state.

        Saves PostgreSQL's BEGIN and ROLLBACK, two of a resolve's three round trips, and, if no mapped objects are
        loaded, SQLAlchemy's transaction.
        """
        with (
            translate_database_errors(),
            self.reading.connect() as connection,
            _ReadSession(connection, expire_on_commit=False) as session,
        ):
            yield session

    @contextmanager
    def snapshot(self) -> Generator[Session]:
        """A `read` whose statements all see the same state, as in any transaction of SQLite."""
        with translate_database_errors(), self._sessions() as session:
            if not self.is_sqlite:
                session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
            yield session

    @contextmanager
    def write(self) -> Generator[Session]:
        """A transaction: committed when the block ends, rolled back when it raises.

        On SQLite it begins IMMEDIATE: of 400 read-then-write transactions in four threads, 300 failed with "database is
        locked" under plain BEGIN, and none under this. Writers of one process wait for each other here, since SQLite
        itself polls every 1 to 100 ms: eight clients together were slower than one alone.
        """
        with translate_database_errors(), self._writing(), self._sessions() as session:
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
            raise Unavailable("database_busy", "Another change is taking too long.")
        try:
            yield
        finally:
            self._turn.release()

    def close(self) -> None:
        self.engine.dispose()


def database_now(session: Session) -> datetime:
    """The time by the database's clock, the one clock that all servers and workers share; leases and expiries use it.
    SQLite's clock is that of the only host that may use the database."""
    if session.get_bind().dialect.name == "sqlite":
        shown = session.scalar(text("SELECT strftime('%Y-%m-%d %H:%M:%f', 'now')"))
        return datetime.fromisoformat(str(shown)).replace(tzinfo=UTC)
    now: datetime = session.execute(text("SELECT clock_timestamp()")).scalar_one()
    return now.astimezone(UTC)


def insert_if_absent(session: Session, table: type[Row], **values: Any) -> bool:
    """Adds a row unless one with the same key exists, and returns whether it did. Waits for another transaction that is
    adding it. For rows that two writers may add at the same time."""
    if session.get_bind().dialect.name == "sqlite":
        from sqlalchemy.dialects.sqlite import insert
    else:
        from sqlalchemy.dialects.postgresql import insert
    key: Any = inspect(table).primary_key[0]
    # RETURNING shows it: PostgreSQL's driver reports no row count for such an insert.
    added = session.execute(insert(table).values(**values).on_conflict_do_nothing().returning(key))
    return added.first() is not None


def _sqlite_wait_s(patience: DatabaseTimeouts) -> float:
    return _SQLITE_MOST_S if patience.statement_s is None else patience.statement_s


def _sqlite(url: URL, patience: DatabaseTimeouts) -> Engine:
    connect = {"check_same_thread": False, "timeout": _sqlite_wait_s(patience)}
    engine = create_engine(url, connect_args=connect, pool_size=SQLITE_POOL_SIZE, max_overflow=0, hide_parameters=True)

    @event.listens_for(engine, "connect")
    def _prepare(connection: Any, _record: object) -> None:  # pyright: ignore[reportUnusedFunction]
        connection.isolation_level = None  # otherwise the driver begins transactions itself, never IMMEDIATE
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
        if mode is None:  # takes no lock, so it cannot fail in a way that needs translation
            connection.connection.execute("BEGIN")
        else:
            connection.exec_driver_sql(f"BEGIN {mode}")

    return engine


def _postgresql(url: URL, patience: DatabaseTimeouts, pool_size: int, role: str) -> Engine:
    from registry.database.postgres import postgresql_engine  # psycopg is imported only where it is used

    return postgresql_engine(url, pool_size, patience.connect_s, patience.statement_s, role)
