"""Orders of search results: by publication, version or score; as columns and as pages."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson
from sqlalchemy import BindParameter, ColumnElement, FromClause, Select, bindparam, select, tuple_
from sqlalchemy.orm import Session

from registry.database.dialects import float_text, json_rows
from registry.database.prepared import Rows
from registry.database.tables import Channel, Release, Score
from registry.domain.access.audit import Actor
from registry.domain.catalog import metrics, suites
from registry.domain.catalog.release_rows import CURRENT_SUITES, Stamp
from registry.errors import Usage

NEWEST, VERSION = "newest", "version"

_SERVED = {"id": "served_id", "sort_key": "served_key"}
_channel, _release, _score = Channel.__table__.c, Release.__table__.c, Score.__table__.c


@dataclass(frozen=True, slots=True)
class Position:
    """A release's position in an order: its sort key (None if the id is the key) and id."""

    key: str | float | None
    release_id: int


class Hit(NamedTuple):
    """A search result: a release's position and its stamp at that time."""

    key: str | float | None
    release_id: int
    stamp: Stamp


@dataclass(frozen=True, slots=True)
class Order:
    """`newest`, `version` (highest first) or `SUITE.METRIC` (best first, only releases that have it)."""

    name: str = NEWEST
    limit: int = 50
    after: Position | Hit | None = None


@dataclass(frozen=True, slots=True)
class SortKey:
    """The shape of an order, over releases or over scores joined to their releases. `of_channel` reads the releases
    that channels of one name serve from the channels' index, which has the releases' keys."""

    column: str = "id"
    descending: bool = True
    goes_on: bool = False
    of_channel: bool = False

    @property
    def of_score(self) -> bool:
        return self.column == "value"

    def select(self, *more: ColumnElement[Any]) -> Select[*tuple[Any, ...]]:
        """Selects keys, ids and `more`."""
        statement = select(self.key.label("key"), self.release_id.label("id"), *more)
        if self.of_score:
            return statement.select_from(Score.__table__).join(Release.__table__, _release.id == _score.release_id)
        if self.of_channel:
            statement = statement.select_from(Channel.__table__).join(
                Release.__table__, _release.id == _channel.served_id
            )
            return statement.where(_channel.name == bindparam("channel"), _channel.served_id.is_not(None))
        return statement.select_from(Release.__table__)

    @property
    def release_id(self) -> ColumnElement[Any]:
        return _score.release_id if self.of_score else _channel.served_id if self.of_channel else _release.id

    @property
    def traits_id(self) -> ColumnElement[int]:
        return _score.traits_id if self.of_score else _release.traits_id

    @property
    def key(self) -> ColumnElement[Any]:
        if self.of_score:
            return _score.value
        return _channel[_SERVED[self.column]] if self.of_channel else _release[self.column]

    def page(self, *conditions: ColumnElement[bool], in_order: bool = True) -> Select[*tuple[Any, ...]]:
        """The first page that meets the conditions, in the form of `text`.

        Scores not read `in_order` are looked up from their releases.
        """
        entries = self.select(_release.stamp).where(*conditions)
        first = self.first(entries, in_order=in_order).subquery("first")
        return self.text(first.c, first.c.stamp).add_columns(CURRENT_SUITES)

    def first(self, statement: Select[*tuple[Any, ...]], *, in_order: bool = True) -> Select[*tuple[Any, ...]]:
        """The first page of a selection of releases or scores, in order."""
        columns = [self.key] if self.column == "id" else [self.key, self.release_id]
        if self.of_score:
            suite = _score.suite_id if in_order else _score.suite_id + 0
            of_metric = (suite == bindparam("by_suite"), _score.metric == bindparam("by_metric"))
            statement = statement.where(*of_metric, _score.release_id.is_not(None))
        if self.goes_on:
            ends: list[BindParameter[Any]] = [bindparam("after_key"), bindparam("after_id")]
            reached, end = tuple_(*columns), tuple_(*ends[-len(columns) :])
            statement = statement.where(reached < end if self.descending else reached > end)
        return statement.order_by(*self._ordered(columns)).limit(bindparam("limit"))

    def first_of_all(self, of_each: FromClause, statement: Select[*tuple[Any, ...]]) -> Select[*tuple[Any, ...]]:
        """The first page of several pages, in order."""
        return statement.order_by(*self._ordered([of_each.c.key, of_each.c.id])).limit(bindparam("limit"))

    def _ordered(self, columns: Sequence[ColumnElement[Any]]) -> list[ColumnElement[Any]]:
        return [column.desc() if self.descending else column.asc() for column in columns]

    def text(self, first: Any, stamp: ColumnElement[int]) -> Select[*tuple[Any, ...]]:
        """Keys, ids and stamps of a page as one JSON text, for `hits` to parse."""
        return select(json_rows(float_text(first.key) if self.of_score else first.key, first.id, stamp))

    def hits(self, pages: Rows, limit: int) -> list[Hit]:
        """The first `limit` hits of several pages."""
        suites = next((suites for _page, suites, *_ in pages), None)
        rows = [row for page, *_ in pages if page for row in orjson.loads(page)]
        if self.of_score:
            rows = [(float(key), release_id, stamp) for key, release_id, stamp in rows]
        rows.sort(reverse=self.descending)
        by_id = self.column == "id"
        return [Hit(None if by_id else key, number, (stamp, suites)) for key, number, stamp in rows[:limit]]


def by_of(session: Session, actor: Actor, order: Order, values: dict[str, Any]) -> SortKey:
    """The shape of an order, whose values are added to `values`."""
    values["limit"] = order.limit
    if order.after:
        values |= {"after_key": order.after.key, "after_id": order.after.release_id}
    goes_on = order.after is not None
    if order.name in (NEWEST, VERSION):
        return SortKey("id" if order.name == NEWEST else "sort_key", goes_on=goes_on)
    suite_name, dot, metric = order.name.rpartition(".")
    if not dot:
        raise Usage("bad_sort", f"{order.name[:80]!r} is not an order.", subject=order.name[:80])
    suite = suites.find(session, suite_name, actor)
    values |= {"by_suite": suite.id, "by_metric": metric}
    return SortKey("value", metrics.is_higher_better(session, suite.name, metric), goes_on)
