"""Runs the migrations over the engine that `registry.database.engine.migrate` hands in."""

from alembic import context
from sqlalchemy import Connection, Engine, text

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
