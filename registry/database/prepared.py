"""Prepared statements for hot queries: compiled once, sent directly to the driver, answered in few rows.

SQLAlchemy caches compiled statements too. But looking one up, expanding lists in its text and wrapping its rows takes
longer than most of these queries take in the databases. And SQLite's driver switches threads at every row: eight
threads each read a page of fifty rows in nine times the time of one thread, and in little more than its time if the
page is one row of JSON.
"""

import json
from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, lru_cache
from typing import Any, ClassVar, ParamSpec, cast

from sqlalchemy import Connection, Dialect, Select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from sqlalchemy.sql.compiler import SQLCompiler

P = ParamSpec("P")
Rows = Sequence[Sequence[Any]]
Query = Select[*tuple[Any, ...]]
FORMS = 512
"""Maximum cached statements of each kind, by query shape."""


def _unwatched(_connection: Connection, _text: str) -> AbstractContextManager[None]:
    return nullcontext()


class Prepared:
    """A query with bind parameters; `in_list` names lists of values. It sees flushed changes. A callable `statement` is
    called when it is first used on a kind of database."""

    watch: ClassVar[Callable[[Connection, str], AbstractContextManager[None]]] = staticmethod(_unwatched)
    """A hook around each statement, set by traces; SQLAlchemy's events do not see these statements."""

    def __init__(self, statement: Query | Callable[[], Query]) -> None:
        self._make: Callable[[], Query] = statement if callable(statement) else lambda: statement
        self._compiled: dict[str, _Compiled] = {}

    def rows(self, session: Session, values: Mapping[str, Any]) -> Rows:
        """The rows as the driver returns them. Ignores other entries of `values`."""
        connection = session.connection()
        return self._for(connection.dialect).rows(connection, values)

    def records(self, session: Session, values: Mapping[str, Any]) -> list[Any]:
        """Rows with named columns, each value converted to its column's type."""
        connection = session.connection()
        return self._for(connection.dialect).records(connection, values)

    def _for(self, dialect: Dialect) -> "_Compiled":
        compiled = self._compiled.get(dialect.name)
        if compiled is None:
            compiled = self._compiled[dialect.name] = _Compiled(self._make(), dialect)
        return compiled

    def column(self, session: Session, values: Mapping[str, Any]) -> list[Any]:
        """The first column of the rows."""
        return [row[0] for row in self.rows(session, values)]


def prepared(make: Callable[P, Query]) -> Callable[P, Prepared]:
    """Wraps a function that builds a query: the result is prepared and cached by its arguments."""

    @lru_cache(FORMS)
    def kept(*arguments: P.args, **named: P.kwargs) -> Prepared:
        return Prepared(lambda: make(*arguments, **named))

    return cast(Callable[P, Prepared], kept)


class _Compiled:
    """A statement compiled for one dialect."""

    def __init__(self, statement: Any, dialect: Dialect) -> None:
        compiled: SQLCompiler = statement.compile(dialect=dialect)
        self.text = compiled.string
        # The statement itself is not kept: it takes a hundred times the memory of its text, in reference cycles.
        self._own = {name: value for name, value in compiled.params.items() if value is not None}
        self._order = compiled.positiontup
        types = {name: bound.type.dialect_impl(dialect) for name, bound in compiled.binds.items()}
        self._sent = [(name, convert) for name, own in types.items() if (convert := own.bind_processor(dialect))]
        columns = statement.exported_columns.items()
        received = [
            (name, column.type.dialect_impl(dialect).result_processor(dialect, None)) for name, column in columns
        ]
        self._names = [name for name, _ in received]
        self._received = [(index, convert) for index, (_, convert) in enumerate(received) if convert]

    def rows(self, connection: Connection, values: Mapping[str, Any]) -> Rows:
        """Runs the statement in the driver: going through SQLAlchemy costs twice the time of SQLite for most of these
        queries."""
        parameters = self._parameters(values)
        driver: Any = connection.connection.driver_connection
        errors: type[Exception] = connection.dialect.loaded_dbapi.Error
        try:
            with Prepared.watch(connection, self.text):
                return driver.execute(self.text, parameters).fetchall()
        except errors as error:
            lost = connection.dialect.is_disconnect(error, driver, None)
            wrapped: BaseException = DBAPIError.instance(
                self.text,
                parameters,
                error,
                errors,
                hide_parameters=True,
                connection_invalidated=lost,
                dialect=connection.dialect,
            )
            if lost:
                connection.invalidate(error)
            raise wrapped from error

    def records(self, connection: Connection, values: Mapping[str, Any]) -> list[Any]:
        made = self._record
        records: list[Any] = []
        for row in self.rows(connection, values):
            columns = list(row)
            for index, convert in self._received:
                columns[index] = convert(columns[index])
            records.append(made(*columns))
        return records

    @cached_property
    def _record(self) -> Any:
        return namedtuple("Record", self._names)  # pyright: ignore[reportUntypedNamedTuple]

    def _parameters(self, values: Mapping[str, Any]) -> Any:
        given = {**self._own, **values}
        for name, convert in self._sent:
            given[name] = convert(given[name])
        if self._order is None:
            return given
        listed = [given[name] for name in self._order]
        return tuple([json.dumps(value) if isinstance(value, list) else value for value in listed])
