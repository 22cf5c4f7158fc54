"""The schema revision of a database, and migrations to this version's."""

import threading
import time
from functools import cache
from pathlib import Path

from sqlalchemy import (
    inspect,
    text,
)
from sqlalchemy.orm import Session as Session

from registry.database.engine import Database
from registry.database.errors import translate_database_errors
from registry.errors import RegistryError, Unavailable

LOOK_S = 2.0
"""The interval at which a writing process checks whether its code still works with the schema."""


def migrations_directory() -> Path:
    """The directory of migrations: inside the installed package, or at the top of a source checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "migrations"
    return installed if installed.is_dir() else package.parent / "migrations"


@cache
def head_revision() -> str:
    """The newest migration when this process first looked: a newer version may have been installed since. The file
    `0001_what.py` has the revision 0001."""
    return max(path.name.split("_")[0] for path in (migrations_directory() / "versions").glob("[0-9]*_*.py"))


def schema_revision(database: Database) -> str | None:
    """The revision of the database's schema; None without our tables."""
    with translate_database_errors():
        if not inspect(database.engine).has_table("alembic_version"):
            return None
    with database.read() as session:
        return session.scalar(text("SELECT version_num FROM alembic_version"))


def migrate(database: Database, revision: str = "head") -> None:
    """Runs the migrations up to `revision`; a concurrent second process waits and then has nothing to do.

    Raises Unavailable for a database that a newer version has migrated.
    """
    from alembic import command
    from alembic.config import Config

    _refuse_newer(schema_revision(database))
    config = Config()
    config.set_main_option("script_location", str(migrations_directory()).replace("%", "%%"))
    config.attributes["engine"] = database.engine
    with translate_database_errors():
        command.upgrade(config, revision)


def ensure_schema(database: Database, *, create: bool, newer: bool = False) -> None:
    """Raises Unavailable for a database with another schema; with `create`, creates the tables of an empty one, and
    with `newer`, accepts a later schema that this code works with, as its migrations say."""
    revision, head = schema_revision(database), head_revision()
    if revision is None and create:
        migrate(database)
    elif revision is None or revision < head:
        raise Unavailable("schema_old", f"The database is at schema {revision or 'none'}, this version needs {head}.")
    elif newer and revision > head and works_with(database, head):
        return
    _refuse_newer(revision)


class SchemaWatch:
    """Refuses the changes of a process that started before an incompatible migration: its statements may still succeed,
    and leave rows that break what the new code relies on. A process checks at most every `LOOK_S` seconds, not at each
    change."""

    def __init__(self) -> None:
        self._looking = threading.Lock()
        self._looked_at = time.monotonic()  # opening the database included a check
        self._refusal: RegistryError | None = None

    def ensure_writable(self, database: Database) -> None:
        """Raises Unavailable while this code does not work with the schema. Reads remain possible."""
        if time.monotonic() - self._looked_at >= LOOK_S and self._looking.acquire(blocking=False):
            try:
                self._refusal = _refusal_of_changes(database)
                self._looked_at = time.monotonic()
            finally:
                self._looking.release()
        if (refusal := self._refusal) is not None:
            raise Unavailable(
                refusal.code, refusal.detail, subject=refusal.subject, next_step=refusal.next_step
            )  # a new one: threads would share its traceback


def _refusal_of_changes(database: Database) -> RegistryError | None:
    try:
        ensure_schema(database, create=False, newer=True)
    except Unavailable as error:
        if not error.code.startswith("schema_"):
            raise
        return Unavailable(
            error.code,
            f"{error.detail} This process does not work with that schema, so it is read-only.",
            next_step="Use a server of the version that migrated the database, and stop the processes of others.",
        )
    return None


def connected(database: Database) -> list[str] | None:
    """The names and addresses of the clients that are connected to the database besides this one, for an operator.
    None on SQLite, which does not record them. A process that has been idle for a minute has no connection."""
    if database.is_sqlite:
        return None
    query = text("""
        SELECT coalesce(nullif(application_name, ''), 'a client without a name'), host(client_addr)
        FROM pg_stat_activity
        WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid()
        GROUP BY 1, 2 ORDER BY 1, 2
    """)
    with database.read() as session:
        return [f"{name} from {address}" if address else name for name, address in session.execute(query)]


def works_with(database: Database, code: str) -> bool:
    """Whether the code whose newest migration is `code` works with the schema of the database."""
    with translate_database_errors():
        columns = {column["name"] for column in inspect(database.engine).get_columns("alembic_version")}
    if "oldest_code" not in columns:
        return False
    with database.read() as session:
        oldest = session.scalar(text("SELECT oldest_code FROM alembic_version"))
    return oldest is not None and oldest <= code


def _refuse_newer(revision: str | None) -> None:
    if revision is not None and revision > (head := head_revision()):
        raise Unavailable("schema_new", f"The database is at schema {revision}, newer than {head}.")
