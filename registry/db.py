"""The database: `read()` and `write()`, the only commit, and the name of a constraint turned into an error."""

import re
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import DateTime, Dialect, Engine, MetaData, TypeDecorator, create_engine, event, inspect, text
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError
from sqlalchemy.orm import DeclarativeBase, sessionmaker
from sqlalchemy.orm import Session as Session

from registry.errors import Conflict, RegistryError, Unavailable

BUSY_TIMEOUT_MS = 10_000
POOL_SIZE = 40
MMAP_BYTES = 256 << 20
"""SQLite's own cache is 2 MB; reading through the page cache made a search over 10,000 releases 2 to 4 times faster."""


class UtcDateTime(TypeDecorator[datetime]):
    """A moment in UTC. SQLite forgets the zone of a timestamp, so it is put back when a row is read."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value.replace(tzinfo=UTC) if value is not None and value.tzinfo is None else value


class Row(DeclarativeBase):
    """Every table; the naming convention gives each constraint the name that `CONSTRAINT_ERRORS` and migrations use."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


def _raced(what: str) -> Callable[[], RegistryError]:
    return lambda: Conflict("raced", f"Somebody else has just created this {what}.", next_step="Run the command again.")


CONSTRAINT_ERRORS: dict[str, Callable[[], RegistryError]] = {
    "pk_bases": _raced("base"),
    "pk_base_aliases": lambda: Conflict(
        "alias_taken", "This alias belongs to another base.", next_step="Choose another alias."
    ),
    "uq_repositories_namespace_name": _raced("repository"),
    "uq_revisions_repository_id_commit": _raced("revision"),
    "uq_releases_repository_id_version": lambda: Conflict(
        "version_taken",
        "This version was published a moment ago.",
        next_step="Look at it with `adaptory show`, or choose the next version.",
    ),
    "uq_channels_repository_id_name": _raced("channel"),
    "uq_suites_digest": _raced("suite"),
    "uq_suites_name": _raced("suite"),
    "uq_scores_release_id_suite_id_metric": _raced("score"),
    "uq_scores_base_digest_suite_id_metric": _raced("score"),
}
"""SQLite names the columns of a broken unique constraint and PostgreSQL its name; `_constraint` reads both."""


class Database:
    """An engine and its two doors. A `Session` never leaves the `with` block that opened it."""

    def __init__(self, url: str) -> None:
        self.url: URL = make_url(url)
        self.engine: Engine = _sqlite(self.url) if self.is_sqlite else _postgresql(self.url)
        self._sessions = sessionmaker(self.engine, expire_on_commit=False)

    @property
    def is_sqlite(self) -> bool:
        return self.url.get_backend_name() == "sqlite"

    @contextmanager
    def read(self) -> Generator[Session]:
        """A transaction that writes nothing: closing rolls it back. Rows keep what was loaded of them."""
        with _told(), self._sessions() as session:
            yield session

    @contextmanager
    def write(self) -> Generator[Session]:
        """A transaction that is committed when the block ends and rolled back when it raises.

        On SQLite it begins IMMEDIATE: of 400 read-then-write transactions in four threads, 300 failed with "database is
        locked" under plain BEGIN, none under this.
        """
        with _told(), self._sessions() as session:
            if self.is_sqlite:
                session.connection(execution_options={"begin": "IMMEDIATE"})
            yield session
            session.commit()

    def ping(self) -> None:
        with self.read() as session:
            session.execute(text("SELECT 1"))

    def close(self) -> None:
        self.engine.dispose()


def insert_if_absent(session: Session, table: type[Row], **values: Any) -> None:
    """Adds a row unless one with the same key is there: for facts that two writers may state at the same moment."""
    insert = sqlite_insert if session.get_bind().dialect.name == "sqlite" else postgresql_insert
    session.execute(insert(table).values(**values).on_conflict_do_nothing())


def _sqlite(url: URL) -> Engine:
    engine = create_engine(
        url, connect_args={"check_same_thread": False, "timeout": BUSY_TIMEOUT_MS / 1000}, pool_size=POOL_SIZE
    )

    @event.listens_for(engine, "connect")
    def _prepare(connection: Any, _record: object) -> None:  # pyright: ignore[reportUnusedFunction]
        connection.isolation_level = None  # the driver would begin by itself, and never IMMEDIATE
        for pragma in (
            "journal_mode=WAL",
            "synchronous=FULL",
            "foreign_keys=ON",
            f"busy_timeout={BUSY_TIMEOUT_MS}",
            f"mmap_size={MMAP_BYTES}",
        ):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Any) -> None:  # pyright: ignore[reportUnusedFunction]
        connection.exec_driver_sql(f"BEGIN {connection.get_execution_options().get('begin', '')}".rstrip())

    return engine


def _postgresql(url: URL) -> Engine:
    if url.drivername == "postgresql":
        url = url.set(drivername="postgresql+psycopg")
    return create_engine(url, pool_size=POOL_SIZE, pool_pre_ping=True)


@contextmanager
def _told() -> Generator[None]:
    """Database errors leave as errors that a user can act on."""
    try:
        yield
    except IntegrityError as error:
        make = CONSTRAINT_ERRORS.get(_constraint(error))
        if make is None:
            raise
        raise make() from error
    except OperationalError as error:
        raise Unavailable(
            "database_unavailable",
            f"The database cannot be used: {error.orig}.",
            next_step="See that it runs, has space and is migrated.",
        ) from error
    except DBAPIError as error:
        if error.connection_invalidated:
            raise Unavailable(
                "database_unavailable", "The connection to the database was lost.", next_step="Try again."
            ) from error
        raise


def _constraint(error: IntegrityError) -> str:
    diagnosis = getattr(error.orig, "diag", None)
    if diagnosis is not None:
        return str(diagnosis.constraint_name or "")
    match = re.match(r"UNIQUE constraint failed: (.+)", str(error.orig))
    if not match:
        return ""
    columns = [column.strip().split(".") for column in match.group(1).split(",")]
    table = Row.metadata.tables.get(columns[0][0])
    names = [column[1] for column in columns]
    if table is not None and [column.name for column in table.primary_key.columns] == names:
        return f"pk_{table.name}"
    return f"uq_{columns[0][0]}_{'_'.join(names)}"


def migrations_directory() -> Path:
    """Inside the installed package, or at the top of a source checkout."""
    here = Path(__file__).resolve().parent
    installed = here / "migrations"
    return installed if installed.is_dir() else here.parent / "migrations"


def head_revision() -> str:
    """The newest migration; a file is named `0001_what.py` and its revision is the number."""
    return max(path.name.split("_")[0] for path in (migrations_directory() / "versions").glob("[0-9]*_*.py"))


def schema_revision(database: Database) -> str | None:
    """None for a database without our tables."""
    with _told():
        if not inspect(database.engine).has_table("alembic_version"):
            return None
    with database.read() as session:
        return session.scalar(text("SELECT version_num FROM alembic_version"))


def migrate(database: Database, revision: str = "head") -> None:
    """Runs the migrations up to `revision`; a second process doing the same waits and finds nothing left to do."""
    from alembic import command
    from alembic.config import Config

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
    elif found > head:
        raise Unavailable(
            "schema_new",
            f"The database is at schema {found}, newer than {head}.",
            next_step="Install a newer adaptory.",
        )
