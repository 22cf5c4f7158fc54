"""Runs the migrations over the engine that `registry.database.engine.migrate` hands in."""

from alembic import context
from sqlalchemy import Connection, Engine, inspect, text

import registry.database.tables  # noqa: F401  (fills the metadata)
from registry.database.engine import Row

LOCK = 0x41444150
"""The advisory lock that keeps two migrating processes apart on PostgreSQL."""


def run(connection: Connection) -> None:
    """In one transaction that begins before Alembic looks where the database is.

    By itself it begins one for each migration on SQLite, and another process could look between two of them.
    """
    sqlite = connection.dialect.name == "sqlite"
    with connection.begin():
        if not sqlite:
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": LOCK})
        context.configure(
            connection=connection, target_metadata=Row.metadata, render_as_batch=sqlite, compare_type=True
        )
        context.run_migrations()
        note_oldest_code(connection)


def note_oldest_code(connection: Connection) -> None:
    """Writes beside the revision which code still works with it, for servers of that code, which do not know of the
    migrations after it. A migration names that code by its newest revision in `oldest_code`; without it, only code that
    knows the migration does."""
    current = context.get_context().get_current_revision()
    applied = [
        script for script in context.script.walk_revisions() if current is not None and script.revision <= current
    ]
    oldest = max((getattr(script.module, "oldest_code", script.revision) for script in applied), default=None)
    if "oldest_code" not in {column["name"] for column in inspect(connection).get_columns("alembic_version")}:
        connection.execute(text("ALTER TABLE alembic_version ADD COLUMN oldest_code VARCHAR(32)"))
    connection.execute(text("UPDATE alembic_version SET oldest_code = :oldest"), {"oldest": oldest})


engine: Engine = context.config.attributes["engine"]
with engine.connect() as connection:
    if connection.dialect.name == "sqlite":
        # A batch alter drops and recreates a table, which foreign keys, if enforced meanwhile, would forbid.
        # SQLite heeds this outside of a transaction alone: so it is said below SQLAlchemy, which would begin one, on a
        # connection that is not used again.
        connection.detach()
        connection.connection.cursor().execute("PRAGMA foreign_keys=OFF")
        connection = connection.execution_options(begin="IMMEDIATE")
    run(connection)
