"""Translates database errors: unavailable, full, or a violated constraint."""

import logging
import re
import sqlite3
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, InvalidRequestError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session as Session

from registry.errors import Conflict, Invalid, Unavailable
from registry.errors.outages import OutageLog

outages = OutageLog(logging.getLogger(__name__))

UNIQUE_VIOLATION, READ_ONLY = "23505", "25006"
"""PostgreSQL's SQLSTATEs."""

_DROPPED_AGAIN = "This connection is closed"
"""The message of SQLAlchemy's pool when a new connection was dropped as well; the error has no type of its own."""


@contextmanager
def translate_database_errors() -> Generator[None]:
    """Translates database errors into errors that a user can act on."""
    try:
        yield
    except IntegrityError as error:
        table = _doubled(error)
        if table is None:
            raise
        raise Conflict(
            "raced", f"Another request has just added the same row to {table.replace('_', ' ')}.", subject=table
        ) from error
    except DataError as error:
        raise Invalid(
            "bad_value",
            "A value does not fit its column: a string is too long or contains a NUL, or a number is too large.",
            next_step="Correct the value and repeat.",
        ) from error
    except PoolTimeout as error:
        raise Unavailable(
            "database_busy", "All of this process's database connections are in use (ADAPTORY_DATABASE_POOL_SIZE)."
        ) from error
    except InvalidRequestError as error:
        if error.args[:1] != (_DROPPED_AGAIN,):
            raise
        outages.warn("The database cannot be used", error)
        raise Unavailable("database_unavailable", "The database drops its connections.") from error
    except OperationalError as error:
        raise _away(error) from error
    except DBAPIError as error:
        if (known := _unusable(error)) is None:
            raise
        raise known from error


def _unusable(error: DBAPIError) -> Unavailable | None:
    if getattr(error.orig, "sqlite_errorcode", None) == sqlite3.SQLITE_NOTADB:
        return Unavailable(
            "database_unavailable",
            "The file is not a SQLite database.",
            next_step="Check the path in ADAPTORY_DATABASE_URL, or restore the file from a backup.",
        )
    if error.connection_invalidated or getattr(error.orig, "sqlstate", None) == READ_ONLY:
        outages.warn("The database cannot be used", error.orig)
        return Unavailable(
            "database_unavailable",
            "The database cannot be used.",
            next_step="Try again; if it persists, check that it runs and is writable.",
        )
    return None


def _away(error: OperationalError) -> Unavailable:
    if _is_limit(error.orig):
        outages.warn("The database accepts no more connections", error.orig)
        return _no_connection_left()
    outages.warn("The database cannot be used", error.orig)
    return Unavailable(
        "database_unavailable",
        "The database cannot be used.",
        next_step="Check that it runs, has space and is migrated.",
    )


def _is_limit(error: BaseException | None) -> bool:
    if isinstance(error, sqlite3.Error):
        return False
    from registry.database.postgres import is_limit

    return is_limit(error)


def _no_connection_left() -> Unavailable:
    return Unavailable(
        "database_connections",
        "PostgreSQL accepts no more connections: its max_connections, or the limit of the user or the database, is "
        "reached.",
        next_step="Try again in a moment. If it persists, lower ADAPTORY_DATABASE_POOL_SIZE or --processes, or raise "
        "max_connections.",
    )


def _doubled(error: IntegrityError) -> str | None:
    """The table that already has an equal row; None for a violation of another constraint."""
    if getattr(error.orig, "sqlstate", None) == UNIQUE_VIOLATION:
        diagnosis: Any = getattr(error.orig, "diag", None)
        return str(diagnosis.table_name)
    match = re.match(r"UNIQUE constraint failed: (\w+)", str(error.orig))
    return match and match.group(1)
