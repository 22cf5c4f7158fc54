"""A scorer of generated SQL: an answer is right if it returns the same rows as the reference query.

Both run on a SQLite database in memory, which `setup` fills. An answer can only read: an authorizer refuses everything
but SELECT, its functions and its columns, so that no file is opened and nothing is changed or loaded. The query's
length, its steps in SQLite's virtual machine, its rows and the size of each value are bounded, so that the same answer
always has the same score. Only an answer whose single steps are slow is ended by the processor time that it has taken.

`setup` comes with a suite, which any publisher may have written. It can make and fill tables, views and indexes of
that database, within bounds, and nothing else: no ATTACH or VACUUM INTO, which open files, and no PRAGMA.
"""

import sqlite3
import time
from collections import Counter
from contextlib import closing
from functools import partial

from composer.formats.recipes.suite import Example

MAX_QUERY_CHARS = 20_000
MAX_ROWS = 1_000
MAX_VALUE_BYTES = 10_000
MAX_STEPS = 1_000_000
"""About a tenth of a second, unless they call functions on long texts."""
MAX_CPU_S = 1.0
MAX_SETUP_STEPS = 10 * MAX_STEPS
MAX_SETUP_CPU_S = 10 * MAX_CPU_S
MAX_PAGES = 2_500
"""Of 4,096 bytes: each answer runs on a copy of the database."""
_STEPS_A_CHECK = 100
_ALLOWED = frozenset({sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE})
_ALLOWED_IN_SETUP = _ALLOWED | {
    sqlite3.SQLITE_CREATE_TABLE,
    sqlite3.SQLITE_CREATE_INDEX,
    sqlite3.SQLITE_CREATE_VIEW,
    sqlite3.SQLITE_INSERT,
    sqlite3.SQLITE_UPDATE,
    sqlite3.SQLITE_DELETE,
    sqlite3.SQLITE_ALTER_TABLE,
    sqlite3.SQLITE_DROP_TABLE,
    sqlite3.SQLITE_DROP_INDEX,
    sqlite3.SQLITE_DROP_VIEW,
    sqlite3.SQLITE_REINDEX,
    sqlite3.SQLITE_TRANSACTION,
}
_FORBIDDEN_FUNCTIONS = frozenset({"load_extension", "random", "randomblob", "zeroblob"})

Rows = list[tuple[object, ...]]


class SqlResults:
    """1 if answer and completion return the same rows, else 0: in any order, unless `ordered`."""

    def __init__(self, setup: str, ordered: bool = False) -> None:
        """`setup` creates tables and fills them. Raises ValueError if it fails or does anything else."""
        self._ordered = ordered
        self._database = sqlite3.connect(":memory:", check_same_thread=False)
        self._database.execute(f"PRAGMA max_page_count = {MAX_PAGES}")
        _restrict(self._database, _ALLOWED_IN_SETUP, MAX_SETUP_STEPS, MAX_SETUP_CPU_S)
        try:
            self._database.executescript(setup)
        except sqlite3.Error as error:
            raise ValueError(f"setup: {error}") from error

    def __call__(self, answer: str, example: Example) -> float:
        """Raises ValueError if the reference query fails: no answer would be right."""
        try:
            wanted = self._rows(example.completion)
        except (sqlite3.Error, ValueError) as error:
            raise ValueError(f"the completion {example.completion[:60]!r} fails: {error}") from error
        try:
            given = self._rows(_unfenced(answer))
        except (sqlite3.Error, ValueError):
            return 0.0
        return float(given == wanted if self._ordered else Counter(given) == Counter(wanted))

    def _rows(self, query: str) -> Rows:
        """Runs one query on a copy of the database, which is gone afterwards."""
        if len(query) > MAX_QUERY_CHARS:
            raise ValueError("the query is too long")
        with closing(sqlite3.connect(":memory:")) as copy:
            self._database.backup(copy)
            copy.execute("PRAGMA query_only = ON")
            _restrict(copy, _ALLOWED, MAX_STEPS, MAX_CPU_S)
            rows = copy.execute(query).fetchmany(MAX_ROWS + 1)
        if len(rows) > MAX_ROWS:
            raise ValueError("too many rows")
        return rows


def _restrict(database: sqlite3.Connection, allowed: frozenset[int], steps: int, cpu_s: float) -> None:
    """Bounds and forbids before any SQL of others is seen."""
    checks, until_s = steps // _STEPS_A_CHECK, time.thread_time() + cpu_s

    def is_over() -> bool:
        nonlocal checks
        checks -= 1
        return checks < 0 or time.thread_time() > until_s

    database.execute("PRAGMA temp_store = MEMORY")  # sorting writes no file
    database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE_BYTES)
    database.setlimit(sqlite3.SQLITE_LIMIT_SQL_LENGTH, 4 * MAX_QUERY_CHARS)
    database.setlimit(sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, 100)
    database.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
    database.set_progress_handler(is_over, _STEPS_A_CHECK)
    database.set_authorizer(partial(_authorize, allowed))


def _authorize(allowed: frozenset[int], action: int, _first: str | None, name: str | None, *_: str | None) -> int:
    forbidden = action == sqlite3.SQLITE_FUNCTION and (name or "").lower() in _FORBIDDEN_FUNCTIONS
    return sqlite3.SQLITE_DENY if forbidden or action not in allowed else sqlite3.SQLITE_OK


def _unfenced(answer: str) -> str:
    """The query inside a Markdown fence, if it stands in one."""
    text = answer.strip()
    if text.startswith("```") and text.endswith("```") and "\n" in text:
        text = text.partition("\n")[2].removesuffix("```")
    return text
