"""A registry's rows as lines of JSON that SQLite and PostgreSQL both load.

A line is either a table, `{"table": ..., "columns": [[name, kind], ...]}`, or a row of the last table named, a list in
the order of its columns. JSON columns keep their exact text, since `null` in JSON is not SQL's NULL. Tables come in the
order in which foreign keys allow them.
"""

import json
from base64 import b64decode, b64encode
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from itertools import groupby, islice
from operator import itemgetter
from types import MappingProxyType
from typing import Any, cast

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    ColumnElement,
    Float,
    Integer,
    LargeBinary,
    String,
    Table,
    Text,
    exists,
    func,
    inspect,
    select,
    table,
    text,
    true,
)
from sqlalchemy import cast as sql_cast
from sqlalchemy.orm import Session

from registry.database.engine import Row, UtcDateTime
from registry.errors import Invalid

_KINDS: tuple[tuple[type[Any], str], ...] = (
    (Boolean, "boolean"),
    (BigInteger, "integer"),
    (Integer, "integer"),
    (Float, "float"),
    (UtcDateTime, "timestamp"),
    (JSON, "json"),
    (LargeBinary, "bytes"),
    (String, "text"),
)
_TO_JSON: dict[str, Callable[[Any], Any]] = {
    "timestamp": lambda value: value.astimezone(UTC).isoformat(),
    "bytes": lambda value: b64encode(value).decode(),
}
NO_CONDITIONS: Mapping[str, ColumnElement[bool]] = MappingProxyType({})
_BATCH = 1_000


def tables(leave_out: Iterable[type[Row]] = ()) -> list[Table]:
    """Our tables, referenced ones first."""
    skipped = {left_out.__tablename__ for left_out in leave_out}
    return [own for own in Row.metadata.sorted_tables if own.name not in skipped]


def dump(
    session: Session, chosen: Iterable[Table], only: Mapping[str, ColumnElement[bool]] = NO_CONDITIONS
) -> Iterator[bytes]:
    """Yields the lines of the chosen tables as the session sees them: all of one moment in a `snapshot`. `only` has
    conditions by table."""
    connection = session.connection()
    for own in chosen:
        kinds = [next(kind for type_, kind in _KINDS if isinstance(column.type, type_)) for column in own.columns]
        yield _line(
            {"table": own.name, "columns": [[c.name, kind] for c, kind in zip(own.columns, kinds, strict=True)]}
        )
        read = [sql_cast(c, Text) if kind == "json" else c for c, kind in zip(own.columns, kinds, strict=True)]
        converted = [(index, convert) for index, kind in enumerate(kinds) if (convert := _TO_JSON.get(kind))]
        query = select(*read).where(only.get(own.name, true())).order_by(*own.primary_key.columns)
        for row in connection.execute(query, execution_options={"yield_per": _BATCH}):
            values = list(row)
            for index, convert in converted:
                if values[index] is not None:
                    values[index] = convert(values[index])
            yield _line(values)


def _line(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def lock_tables(session: Session) -> None:
    """Blocks other writers until this transaction ends. SQLite has one writer at a time anyway."""
    if session.get_bind().dialect.name == "postgresql":
        names = ", ".join(_present(session))
        session.execute(text(f"LOCK TABLE {names} IN ACCESS EXCLUSIVE MODE"))


def first_filled(session: Session, leave_out: Iterable[type[Row]] = ()) -> str | None:
    """The first of our tables that has rows; None for an empty registry."""
    skipped = {left_out.__tablename__ for left_out in leave_out}
    for name in _present(session):
        if name not in skipped and session.scalar(select(exists().select_from(table(name)))):
            return name
    return None


def counts(session: Session) -> dict[str, int]:
    """The number of rows in each of our tables that this database has."""
    return {name: session.scalar(select(func.count()).select_from(table(name))) or 0 for name in _present(session)}


def _present(session: Session) -> list[str]:
    """Our tables that this database has; an older schema lacks some."""
    known = set(inspect(session.connection()).get_table_names())
    return [own.name for own in tables() if own.name in known]


def load(session: Session, lines: Iterable[bytes], leave_out: Collection[str] = ()) -> dict[str, int]:
    """Adds the rows of a dump to a database of the same schema, and returns their number by table. Tables named in
    `leave_out` stay empty.

    Foreign keys are checked once all rows of a table, or of all tables, are loaded: some refer to rows of their own
    table. Raises Invalid for lines that are not a dump of this schema.
    """
    loader = _load_sqlite if session.get_bind().dialect.name == "sqlite" else _load_postgresql
    described = inspect(session.connection()).get_multi_columns()
    known = {name: {column["name"] for column in columns} for (_, name), columns in described.items()}
    counts: dict[str, int] = {}
    if loader is _load_sqlite:
        session.execute(text("PRAGMA defer_foreign_keys=ON"))
    try:
        for (name, columns), rows in groupby(_sections(lines), key=itemgetter(0)):
            if name in leave_out:
                continue
            if name not in known or not {column for column, _ in columns} <= known[name]:
                message = f"The rows of {name} do not fit the schema of the backup."
                raise Invalid("backup_damaged", message, subject=name)
            counts[name] = loader(session, name, columns, (row for _, row in rows))
    except (LookupError, RecursionError, TypeError, ValueError) as error:  # somebody else may have written them
        message = f"The backup has rows that are impossible in a registry: {type(error).__name__}."
        raise Invalid("backup_damaged", message, subject="rows") from error
    return counts


Columns = tuple[tuple[str, str], ...]
Head = tuple[str, Columns]


def _sections(lines: Iterable[bytes]) -> Iterator[tuple[Head, list[Any]]]:
    """Each row with its table and columns."""
    head: Head | None = None
    for line in lines:
        document = json.loads(line)
        if isinstance(document, dict):
            described = cast("dict[str, Any]", document)
            head = described["table"], tuple((name, kind) for name, kind in described["columns"])
        elif head is not None:
            yield head, document


def _converted(
    columns: Columns, rows: Iterator[list[Any]], timestamp: Callable[[str], Any] | None
) -> Iterator[list[Any]]:
    ways: dict[str, Callable[[Any], Any] | None] = {"bytes": b64decode, "timestamp": timestamp}
    converted = [(index, way) for index, (_, kind) in enumerate(columns) if (way := ways.get(kind))]
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"{len(row)} values for {len(columns)} columns")
        for index, way in converted:
            if row[index] is not None:
                row[index] = way(row[index])
        yield row


def _load_sqlite(session: Session, name: str, columns: Columns, rows: Iterator[list[Any]]) -> int:
    quote = session.get_bind().dialect.identifier_preparer.quote
    names, marks = ", ".join(quote(name) for name, _ in columns), ", ".join("?" for _ in columns)
    statement, count = f"INSERT INTO {quote(name)} ({names}) VALUES ({marks})", 0  # noqa: S608  (names of this schema)
    values = _converted(columns, rows, _sqlite_timestamp)
    while batch := [tuple(row) for row in islice(values, _BATCH)]:
        session.connection().exec_driver_sql(statement, batch)
        count += len(batch)
    return count


def _sqlite_timestamp(value: str) -> str:
    """The timestamp in the form that SQLAlchemy writes on SQLite."""
    return datetime.fromisoformat(value).astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S.%f")


def _load_postgresql(session: Session, name: str, columns: Columns, rows: Iterator[list[Any]]) -> int:
    """Loads with COPY, which is one statement: a row may refer to a later one of its table."""
    import psycopg

    quote = session.get_bind().dialect.identifier_preparer.quote
    names = ", ".join(quote(name) for name, _ in columns)
    driver: Any = session.connection().connection.driver_connection
    count = 0
    try:
        with driver.cursor() as cursor, cursor.copy(f"COPY {quote(name)} ({names}) FROM STDIN") as copy:
            for row in _converted(columns, rows, None):
                copy.write_row(row)
                count += 1
    except (psycopg.DataError, psycopg.IntegrityError) as error:
        raise Invalid(
            "backup_damaged",
            f"PostgreSQL does not accept the rows of {name}: {str(error).splitlines()[0]}.",
            subject=name,
            next_step="Restore it into SQLite, and correct the rows there.",
        ) from error
    _count_on(session, name)
    return count


def _count_on(session: Session, name: str) -> None:
    """Makes PostgreSQL number new rows after the highest, and plan with the current row counts."""
    for key in Row.metadata.tables[name].primary_key.columns:
        sequence = session.scalar(text("SELECT pg_get_serial_sequence(:name, :key)"), {"name": name, "key": key.name})
        if sequence is not None:
            highest = session.scalar(text(f"SELECT max({key.name}) FROM {name}"))  # noqa: S608  (names of our tables)
            session.execute(text("SELECT setval(:sequence, :highest)"), {"sequence": sequence, "highest": highest})
    session.execute(text(f"ANALYZE {name}"))
