"""SQL that PostgreSQL and SQLite spell differently."""

from collections.abc import Sequence
from typing import Any, TypeVar

from sqlalchemy import BigInteger, ColumnElement, Integer, Select, bindparam
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

T = TypeVar("T")
PLANNED_VALUES = 10
"""The length of lists in PostgreSQL's kept plans."""


class _Spelled(FunctionElement[Any]):
    """SQL that differs between SQLite and PostgreSQL; the texts have `{0}`, `{1}` or `{all}` for the arguments."""

    inherit_cache = False

    def __init__(self, sqlite: str, postgresql: str, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.texts = {"sqlite": sqlite, "postgresql": postgresql}


@compiles(_Spelled)
def _spell(element: _Spelled, compiler: SQLCompiler, **options: Any) -> str:  # pyright: ignore[reportUnusedFunction]
    arguments = [compiler.process(argument, **options) for argument in element.clauses]
    return element.texts[compiler.dialect.name].format(*arguments, all=", ".join(arguments))


def in_list(column: ColumnElement[Any], name: str) -> ColumnElement[bool]:
    """A condition: the column has one of the values in the parameter, a list of texts or integers."""
    kind = "BIGINT" if isinstance(column.type, BigInteger | Integer) else "TEXT"
    unnest = f"{{0}} = ANY (CAST({{1}} AS {kind}[]))"
    return _Spelled("{0} IN (SELECT value FROM json_each({1}))", unnest, column, bindparam(name))


def in_subquery(column: ColumnElement[Any], rows: Select[*tuple[Any, ...]]) -> ColumnElement[bool]:
    """A condition: the column has one of the values of the subquery `rows`, which are few and do not depend on the
    outer query.

    They are read first, and each is looked up in an index of the column. PostgreSQL cannot know that they are few, and
    would otherwise scan the table and look up each row among them.
    """
    return _Spelled("{0} IN {1}", "{0} = ANY (ARRAY{1})", column, rows.scalar_subquery())


def in_set(column: ColumnElement[Any], rows: Select[*tuple[Any, ...]]) -> ColumnElement[bool]:
    """The same condition for a statement that reads its own table in order: the values are read once, and the value of
    each row is looked up among them. No index of the column is used."""
    return _Spelled("+{0} IN {1}", "({0} IN {1}) IS TRUE", column, rows.scalar_subquery())


def padded(values: Sequence[T]) -> list[T]:
    """The values for `in_list`, the last one repeated up to the length that PostgreSQL's kept plans are made for. For
    fewer, PostgreSQL would plan anew, which took five times as long as reading one release."""
    items = list(values)
    return items + items[-1:] * (PLANNED_VALUES - len(items))


def json_list(column: ColumnElement[Any]) -> ColumnElement[str]:
    """An aggregate: a column's values as the text of a JSON array; null or empty without rows."""
    return _Spelled("json_group_array({0})", "CAST(json_agg({0}) AS TEXT)", column)


def json_rows(*columns: Any) -> ColumnElement[str]:
    """An aggregate: the rows as the text of a JSON array of arrays; null or empty without rows. Floats must be
    `float_text`, since SQLite rounds floats in JSON to 15 digits."""
    return _Spelled("json_group_array(json_array({all}))", "CAST(json_agg(json_build_array({all})) AS TEXT)", *columns)


def float_text(column: ColumnElement[Any]) -> ColumnElement[str]:
    """A float as text that reads back as the same number."""
    return _Spelled("CASE WHEN {0} IS NOT NULL THEN printf('%!.17g', {0}) END", "CAST({0} AS TEXT)", column)


def timestamp_text(column: ColumnElement[Any]) -> ColumnElement[str]:
    """A timestamp as in JSON documents: RFC 3339 in UTC, with microseconds if there are any."""
    text = "replace({}, '.000000', '') || 'Z'"
    return _Spelled(
        text.format("replace({0}, ' ', 'T')"),
        text.format("to_char({0} AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US')"),
        column,
    )
