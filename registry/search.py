"""Query value -> releases that fit a base, a rank, a set of targets, a server and scores.

A search costs what its page costs, however many releases there are: what fits is decided on interned traits, and of
each combination that fits an index already has the order. Only when many fit are all releases looked at in that order,
and then the page is soon full. A condition that few releases meet is looked up first instead.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Select, String, cast, func, literal, select, tuple_
from sqlalchemy.orm import InstrumentedAttribute, Session

from composer.formats.serving import Loading, loads
from registry import bases, conditions, suites
from registry.audit import Actor
from registry.conditions import Query as Query
from registry.errors import Usage
from registry.models import Base, Release, Score, Traits
from registry.suites import HIGHER_IS_BETTER

NEWEST, VERSION = "newest", "version"
FEW = 16
"""So many combinations of traits are merged; with more, the page is filled from all releases in order."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a page ended: the sort key of its last release (None where the id is the key) and its id."""

    key: str | float | None
    release_id: int


@dataclass(frozen=True, slots=True)
class Order:
    """`newest`, `version` (the highest first) or `SUITE.METRIC` (the best first, without releases that lack it)."""

    name: str = NEWEST
    limit: int = 50
    after: Place | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """`relation` is how the release's base follows from the one asked for: "" where it is that one."""

    release: Release
    place: Place
    relation: str
    loading: Loading | None


@dataclass(frozen=True, slots=True)
class _By:
    """An order as columns: of releases, or of scores joined to their releases."""

    key: InstrumentedAttribute[Any] | None
    release_id: InstrumentedAttribute[Any]
    traits_id: InstrumentedAttribute[Any]
    where: tuple[ColumnElement[bool], ...] = ()
    descending: bool = True

    def page(self, statement: Select[*tuple[Any, ...]], order: Order) -> Select[*tuple[Any, ...]]:
        """The next `order.limit` rows of a statement on this order's table."""
        columns = [self.release_id] if self.key is None else [self.key, self.release_id]
        if order.after:
            last = [order.after.release_id] if self.key is None else [order.after.key, order.after.release_id]
            reached = tuple_(*columns)
            statement = statement.where(reached < tuple_(*last) if self.descending else reached > tuple_(*last))
        ordered = [column.desc() if self.descending else column.asc() for column in columns]
        return statement.where(*self.where).order_by(*ordered).limit(order.limit)

    def joined(self, statement: Select[*tuple[Any, ...]]) -> Select[*tuple[Any, ...]]:
        if self.release_id.class_ is Release:
            return statement
        return statement.join_from(Score, Release, Release.id == Score.release_id)


_NEWEST = _By(None, Release.id, Release.traits_id)
_VERSION = _By(Release.sort_key, Release.id, Release.traits_id)


def search(session: Session, actor: Actor, query: Query, order: Order) -> tuple[Base | None, list[Found]]:
    """The base asked for and what the actor may read of what fits, in order.

    Raises NotFound for a base or a suite that is not registered.
    """
    base = bases.find(session, query.base) if query.base else None
    relations = bases.related(session, base, transitive=query.related) if base else {}
    by = _by(session, order.name)
    fits = select(Traits.id).where(*conditions.on_traits(query, list(relations)))
    current = [suites.find(session, condition.suite) for condition in query.scores]
    asked = conditions.on_release(actor, query, current)
    statement = by.joined(select(Release, literal(None) if by.key is None else by.key))
    rare = conditions.rarest(session, actor, query, current, fits)
    if rare is not None:
        statement = statement.where(Release.id.in_(rare), Release.traits_id.in_(fits), *asked)
    else:
        few = _of_few(session, fits, by, order, asked)
        # Ids are sorted first and only the page's rows are read: a sort of whole rows carries the facts of every match.
        statement = statement.where(Release.id.in_(_of_all(fits, by, order, asked) if few is None else few))
    rows: Sequence[Any] = () if rare == [] else session.execute(by.page(statement, order)).all()
    return base, [
        Found(release, Place(key, release.id), relations.get(release.base_digest, ""), _loading(query, release))
        for release, key in rows
    ]


def _of_few(
    session: Session, fits: Select[*tuple[Any, ...]], by: _By, order: Order, asked: Sequence[ColumnElement[bool]]
) -> Sequence[int] | None:
    """Of each combination of traits that fits, the ids of as many releases as a page has; None when many fit.

    One text for each: an aggregate is what both databases can make of an ordered and limited part of an index.
    """
    fitting = fits.limit(FEW + 1).subquery("fitting")
    entries = by.joined(select(by.release_id.label("id"))).where(by.traits_id == fitting.c.id, *asked)
    entries = by.page(entries, order).correlate(fitting).subquery("entries")
    ids = select(func.aggregate_strings(cast(entries.c.id, String), ",")).scalar_subquery()
    rows = session.scalars(select(ids).select_from(fitting)).all()
    if len(rows) > FEW:
        return None
    found = [int(number) for row in rows if row for number in row.split(",")]
    return sorted(found, reverse=True)[: order.limit] if by is _NEWEST else found


def _of_all(
    fits: Select[*tuple[Any, ...]], by: _By, order: Order, asked: Sequence[ColumnElement[bool]]
) -> Select[*tuple[Any, ...]]:
    """The ids of the page among all releases in order. The sum keeps SQLite from collecting and sorting what fits."""
    entries = by.joined(select(by.release_id)).where((by.traits_id + 0).in_(fits), *asked)
    return by.page(entries, order)


def _by(session: Session, name: str) -> _By:
    if name in (NEWEST, VERSION):
        return _NEWEST if name == NEWEST else _VERSION
    suite_name, dot, metric = name.rpartition(".")
    if not dot:
        raise Usage(
            "bad_sort",
            f"{name[:80]!r} is not an order.",
            subject=name[:80],
            next_step="Sort by newest, version or SUITE.METRIC.",
        )
    suite = suites.find(session, suite_name)
    of_metric = (Score.suite_id == suite.id, Score.metric == metric)
    better = HIGHER_IS_BETTER.get(metric)
    if better is None:
        better = session.scalar(select(Score.higher_is_better).where(*of_metric).limit(1))
    of_releases = (*of_metric, Score.release_id.is_not(None))
    return _By(Score.value, Score.release_id, Score.traits_id, of_releases, descending=better is not False)


def _loading(query: Query, release: Release) -> Loading | None:
    if query.loads_in is None:
        return None
    return loads(release.servers, release.loading, release.rank_max or 0, query.loads_in)
