"""Orders of search results: by publication, version, size, rank or score."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlalchemy.orm import Session

from registry.domain.access.audit import Actor
from registry.domain.catalog import metrics, suites
from registry.domain.catalog.release_rows import Stamp
from registry.errors import Usage

NEWEST, VERSION, SIZE, RANK = "newest", "version", "size", "rank"


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
    """`newest`, `version` (highest first), `size` or `rank` (lowest first), or `SUITE.METRIC` (best first, only
    releases that have it)."""

    name: str = NEWEST
    limit: int = 50
    after: Position | Hit | None = None


class SortKey(NamedTuple):
    """The shape of an order: the column of a release or, for `value`, of a score, and whether a cursor is given."""

    column: str
    descending: bool
    goes_on: bool


_COLUMNS = {NEWEST: ("id", True), VERSION: ("sort_key", True), SIZE: ("size_bytes", False), RANK: ("rank_max", False)}
"""Name of an order -> its column, and whether that descends."""


def sort_key(session: Session, actor: Actor, order: Order, values: dict[str, Any]) -> SortKey:
    """The shape of an order, whose values are added to `values`."""
    values["limit"] = order.limit
    if order.after:
        values |= {"after_key": order.after.key, "after_id": order.after.release_id}
    goes_on = order.after is not None
    if order.name in _COLUMNS:
        return SortKey(*_COLUMNS[order.name], goes_on)
    suite_name, dot, metric = order.name.rpartition(".")
    if not dot:
        raise Usage("bad_sort", f"Unknown sort order {order.name[:80]!r}.", subject=order.name[:80])
    suite = suites.find(session, suite_name, actor)
    values |= {"by_suite": suite.id, "by_metric": metric}
    return SortKey("value", metrics.is_higher_better(session, suite.name, metric), goes_on)
