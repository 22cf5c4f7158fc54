"""Query value -> releases that fit a base, a rank, a set of targets, a server and scores.

A search costs what its page costs, however many releases there are: what fits is decided on interned traits, and of each
combination that fits the index already has the order. Only when very many fit is everything looked at in that order, and
then the page is soon full.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import ColumnElement, Select, String, cast, func, select, tuple_
from sqlalchemy.orm import InstrumentedAttribute, Session

from composer.formats.serving import Loading, loads
from registry import bases, conditions, suites
from registry.audit import Actor
from registry.conditions import Query as Query
from registry.errors import Usage
from registry.models import Base, Release, Score, Suite, Traits
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
    relation: str = ""
    loading: Loading | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    base: Base | None
    found: list[Found] = field(default_factory=list[Found])


@dataclass(frozen=True, slots=True)
class _Sorted:
    """An order as columns: of releases, or of scores joined to their releases."""

    key: InstrumentedAttribute[Any] | None
    release_id: InstrumentedAttribute[Any]
    traits_id: InstrumentedAttribute[Any]
    descending: bool = True
    where: tuple[ColumnElement[bool], ...] = ()

    def ids(self) -> Select[Any]:
        found = select(self.release_id.label("id"))
        return found.join(Release, Release.id == Score.release_id) if self.release_id is Score.release_id else found

    def page(self, statement: Select[Any], order: Order) -> Select[Any]:
        columns = [self.release_id] if self.key is None else [self.key, self.release_id]
        if order.after:
            reached = tuple_(*columns)
            last = [order.after.release_id] if self.key is None else [order.after.key, order.after.release_id]
            statement = statement.where(reached < tuple_(*last) if self.descending else reached > tuple_(*last))
        ordered = [column.desc() if self.descending else column.asc() for column in columns]
        return statement.where(*self.where).order_by(*ordered).limit(order.limit)


def search(session: Session, actor: Actor, query: Query, order: Order) -> Answer:
    """What the actor may read, in the order asked for. Raises NotFound for a base or a suite that is not registered."""
    base = bases.find(session, query.base) if query.base else None
    relations = _relations(session, base, related=query.related)
    current = [suites.find(session, condition.suite) for condition in query.scores]
    by = _sorted(session, order)
    fits = select(Traits.id).where(*conditions.on_traits(query, list(relations)))
    asked = conditions.on_release(actor, query, current)
    rare = conditions.rarest(session, actor, query, current, fits)
    if rare is None:
        ids = _few(session, fits, by, order, asked)
    else:
        ids = rare
    if ids is None:
        statement = by.page(by.ids().where((by.traits_id + 0).in_(fits), *asked), order)
        ids = session.scalars(statement).all()
        asked = []
    return Answer(base, [])
