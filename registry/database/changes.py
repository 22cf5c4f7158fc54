"""Notices commits, for a process that waits until what it has read may have changed."""

from typing import Any

from sqlalchemy import PoolProxiedConnection

from registry.database.engine import Database
from registry.database.errors import translate_database_errors


class CommitWatch:
    """Compares a database with what it was a moment ago, without reading a table. For one thread at a time."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._sqlite: PoolProxiedConnection | None = None

    @property
    def is_quick(self) -> bool:
        """Whether the next mark takes microseconds, as of SQLite, which has it in shared memory. A thread for each
        mark costs as much as a thousand idle streams."""
        return self._sqlite is not None

    def mark(self) -> Any:
        """A value that differs after each commit to the database, by whatever process, and perhaps at other times.
        Raises Unavailable if the database does not answer.

        SQLite counts the commits of all connections but the one that is asked, which therefore does nothing else. On
        PostgreSQL the mark is the set of transactions whose changes can be seen.
        """
        with translate_database_errors():
            if not self._database.is_sqlite:
                with self._database.reading.connect() as connection:
                    return connection.exec_driver_sql("SELECT pg_current_snapshot()::text").scalar_one()
            if self._sqlite is None:
                self._sqlite = self._database.reading.raw_connection()
            cursor = self._sqlite.cursor()
            try:
                cursor.execute("PRAGMA data_version")
                return cursor.fetchone()
            finally:
                cursor.close()

    def close(self) -> None:
        """Returns the connection. The next mark then differs from those before."""
        if self._sqlite is not None:
            self._sqlite.close()
            self._sqlite = None
