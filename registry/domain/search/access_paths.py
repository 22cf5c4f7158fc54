"""The ways to find a page of hits. Each returns None where it does not apply or another way costs less.

The cost depends on the page, not on the number of releases. A condition that few releases meet is looked up first, and
the others are checked on those. Terms are read from their index, newest first, since all matches may be old. Most
filters apply to interned traits, and an index has the releases of each combination of traits in order. If many
combinations match, all releases are read in order, and the page fills quickly.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import orjson
from sqlalchemy import CTE, ColumnElement, Select, bindparam, case, func, literal_column, select, true
from sqlalchemy.orm import Session

from registry.database.dialects import in_list, json_list, padded
from registry.database.prepared import Prepared, prepared
from registry.database.prepared import Query as Selection
from registry.database.tables import Channel, Release, ReleaseWord, Score
from registry.domain.catalog.release_rows import CURRENT_SUITES
from registry.domain.search.filters import (
    QueryShape,
    ScoreLimit,
    Term,
    Values,
    matching_traits,
    release_conditions,
    traits_match,
)
from registry.domain.search.ordering import Hit, SortKey
from registry.domain.search.term_index import END, ENTRIES, MORE, TermMatches, iterate_matches

FEW = 16
"""Up to this many trait combinations are merged; beyond it, the page is filled from all releases in order."""
RARE = 500
"""A condition that at most this many releases meet is looked up first; the others are checked on those."""
SIDE_BY_SIDE = 2_000
"""The same for matches that are contiguous in an index: listing this many takes 0.2 ms."""
RARE_TRAITS = 100
"""The same for traits, if there is a term to read instead."""
COMMON = 10
"""A term that at least one in COMMON of the newest releases has is not read before the releases of few traits."""

_channel, _release, _score, _word = (table.__table__.c for table in (Channel, Release, Score, ReleaseWord))

_NEWEST_OF_ALL = Prepared(select(func.max(_release.id)))


@dataclass(frozen=True, slots=True)
class Search:
    """A query and an order, bound to values. If the order is that of publication, `term` has the newest matches of the
    most selective term; `listed` are the terms that match too many words for that, or all terms in other orders."""

    shape: QueryShape
    by: SortKey
    values: Values
    term: TermMatches | None
    listed: Sequence[Term]

    @property
    def limit(self) -> int:
        return self.values["limit"]


def by_rare_term(session: Session, asked: Search) -> list[Hit] | None:
    """Reads the releases with a term that few have, and checks the other conditions on those."""
    if asked.term and asked.term.are_all:
        return _among(session, asked, [asked.term.ids])
    return _first(_by_list(session, asked, _with_term(term, SIDE_BY_SIDE)) for term in asked.listed)


def by_rare_score(session: Session, asked: Search) -> list[Hit] | None:
    """Tries scores among all releases first, then among those with matching traits: no score may be good enough, and
    thousands of trait combinations may match."""
    shape = asked.shape
    hits = _first(_by_list(session, asked, _with_score(score, SIDE_BY_SIDE)) for score in shape.scores)
    if hits is None and shape.has_traits:
        hits = _first(_by_list(session, asked, _with_fitting_score(shape, score, RARE)) for score in shape.scores)
    return hits


def by_channel(session: Session, asked: Search) -> list[Hit] | None:
    """Reads what the channels of the requested name serve, if they are few."""
    return _by_list(session, asked, _on_channel(RARE)) if "channel" in asked.shape.filters else None


def by_size(session: Session, asked: Search) -> list[Hit] | None:
    """Reads the releases below the size limit, if they are few."""
    return _by_list(session, asked, _small(RARE)) if "max_size_bytes" in asked.shape.filters else None


def by_few_traits(session: Session, asked: Search) -> list[Hit] | None:
    """Merges the releases of each combination of traits. A term that few of the newest releases have is read first."""
    if asked.term and not (asked.shape.has_traits and _is_common(session, asked.term, asked.values)):
        return None
    pages = _of_few(asked.shape, asked.by, FEW).rows(session, asked.values)
    many = any(fitting > FEW for _page, _suites, fitting in pages)
    return None if many else asked.by.hits(pages, asked.limit)


def by_rare_traits(session: Session, asked: Search) -> list[Hit] | None:
    """For a search by a term too: few or none of its releases may have the traits."""
    if not asked.term or not asked.shape.has_traits:
        return None
    traits = _few_fitting(asked.shape, FEW).column(session, asked.values)
    return None if len(traits) > FEW else _by_list(session, asked, _with_traits(RARE_TRAITS), traits=traits)


def by_term(session: Session, asked: Search) -> list[Hit] | None:
    """Reads the releases with the most selective term, newest first, until the page is full."""
    if not asked.term:
        return None
    return _among(session, asked, iterate_matches(session, asked.shape, asked.term, asked.values))


def in_order(session: Session, asked: Search) -> list[Hit]:
    """Reads all releases, or all that channels of the name serve, until the page is full."""
    of_channel = "channel" in asked.shape.filters and not asked.by.of_score
    pages = _of_all(asked.shape, replace(asked.by, of_channel=of_channel)).rows(session, asked.values)
    return asked.by.hits(pages, asked.limit)


PATHS = (by_rare_term, by_rare_score, by_channel, by_size, by_few_traits, by_rare_traits, by_term, in_order)
"""The first one that returns a page is taken."""


def _is_common(session: Session, term: TermMatches, values: Values) -> bool:
    [newest] = [values["after_id"]] if "after_id" in values else _NEWEST_OF_ALL.column(session, {})
    return newest - term.ids[-1] <= COMMON * term.count


def _first(pages: Iterable[list[Hit] | None]) -> list[Hit] | None:
    return next((hits for hits in pages if hits is not None), None)


def _by_list(session: Session, asked: Search, statement: Prepared, **values: Any) -> list[Hit] | None:
    """The page from a list of releases; None if that is too long, where the statement returns NULL."""
    [text] = statement.column(session, {**asked.values, **values})
    if text is None:
        return None
    ids = orjson.loads(text)
    return _among(session, asked, _newest_first(ids, asked.values) if asked.by.column == "id" else [ids])


def _newest_first(ids: Sequence[int], values: Values) -> Iterator[Sequence[int]]:
    """The ids in batches, newest first; the first batch is usually enough."""
    left = sorted({number for number in ids if number < values.get("after_id", END)}, reverse=True)
    count = ENTRIES * values["limit"]
    while left:
        yield left[:count]
        left, count = left[count:], count * MORE


def _among(session: Session, asked: Search, parts: Iterable[Sequence[int]]) -> list[Hit]:
    """The page from lists of releases, each entirely before the next in the order."""
    hits: list[Hit] = []
    for ids in parts:
        if ids:
            pages = _of_list(asked.shape, asked.by).rows(session, {**asked.values, "ids": padded(ids)})
            hits += asked.by.hits(pages, asked.limit)
        if len(hits) >= asked.limit:
            break
    return hits[: asked.limit]


@prepared
def _with_term(term: Term, most: int) -> Selection:
    return _unless_many(select(_word.release_id.label("id")).where(term.matches(_word.word)), most)


@prepared
def _with_score(score: ScoreLimit, most: int) -> Selection:
    return _unless_many(_scored(score), most)


@prepared
def _with_fitting_score(shape: QueryShape, score: ScoreLimit, most: int) -> Selection:
    return _unless_many(_scored(score).where(_score.traits_id.in_(matching_traits(shape))), most)


def _scored(score: ScoreLimit) -> Selection:
    return select(_score.release_id.label("id")).where(_score.release_id.is_not(None), *score.conditions())


@prepared
def _on_channel(most: int) -> Selection:
    of_name = (_channel.name == bindparam("channel"), _channel.served_id.is_not(None))
    return _unless_many(select(_channel.served_id.label("id")).where(*of_name), most)


@prepared
def _small(most: int) -> Selection:
    return _unless_many(select(_release.id).where(_release.size_bytes <= bindparam("max_size_bytes")), most)


@prepared
def _few_fitting(shape: QueryShape, few: int) -> Selection:
    return _limited(matching_traits(shape), few + 1)


@prepared
def _with_traits(most: int) -> Selection:
    return _unless_many(select(_release.id).where(in_list(_release.traits_id, "traits")), most)


def _unless_many(releases: Selection, most: int) -> Selection:
    matching = releases.limit(most + 1).cte("matching")
    ids = func.coalesce(json_list(matching.c.id), "[]")
    return select(case((func.count() <= most, ids))).select_from(matching)


def _each_of_few(shape: QueryShape, by: SortKey, few: int) -> Selection:
    """For each matching trait combination, a page of keys and ids, and the number of matches; NULL if there are many.

    One text for each, since SQLite can aggregate an ordered and limited part of an index.
    """
    fitting, count = _fitting(shape, few)
    first = by.first(_entries(shape, by, fitting, _release.stamp)).correlate(fitting).subquery("first")
    each = select(case((count <= few, by.text(first.c, first.c.stamp).scalar_subquery())), CURRENT_SUITES, count)
    return each.select_from(fitting)


def _all_of_few(shape: QueryShape, by: SortKey, few: int) -> Selection:
    """One merged text: PostgreSQL looks up only the stamps of that page."""
    fitting, count = _fitting(shape, few)
    of_each = by.first(_entries(shape, by, fitting)).lateral("of_each")
    all_first = select(of_each.c.key, of_each.c.id).select_from(fitting.join(of_each, true())).where(count <= few)
    page = by.first_of_all(of_each, all_first).subquery("page")
    stamp = select(_release.stamp).where(_release.id == page.c.id).scalar_subquery()
    return select(by.text(page.c, stamp).scalar_subquery(), CURRENT_SUITES, count)


_of_few = prepared(_each_of_few, postgresql=_all_of_few)


def _fitting(shape: QueryShape, few: int) -> tuple[CTE, ColumnElement[int]]:
    """The matching trait combinations, at most `few + 1`, and their number."""
    fitting = _limited(matching_traits(shape), few + 1).cte("fitting")
    return fitting, select(func.count()).select_from(fitting).scalar_subquery()


def _limited(traits: Selection, count: int) -> Selection:
    """The limit is a literal: a generic plan for a bound limit reads a tenth of the matches, without an index."""
    return traits.limit(literal_column(str(count)))


def _entries(shape: QueryShape, by: SortKey, fitting: CTE, *more: ColumnElement[Any]) -> Select[*tuple[Any, ...]]:
    return by.select(*more).where(by.traits_id == fitting.c.id, *release_conditions(shape))


@prepared
def _of_all(shape: QueryShape, by: SortKey) -> Selection:
    """The page from all releases in order. `+ 0` keeps SQLite from collecting and sorting all matches."""
    return by.page(traits_match(shape, by.traits_id + 0), *release_conditions(shape))


@prepared
def _of_list(shape: QueryShape, by: SortKey) -> Selection:
    asked = (traits_match(shape, _release.traits_id), *release_conditions(shape))
    return by.page(in_list(by.release_id, "ids"), *asked, in_order=False)
