"""Searches releases by base, rank, targets, server, scores and words.

The cost depends on the page, not on the number of releases. Most filters apply to interned traits, and an index has the
releases of each combination of traits in order. If many combinations match, all releases are read in order, and the
page fills quickly. A condition that few releases meet is looked up first instead. Words are read from the term index,
newest first, since all matches may be old.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any

import orjson
from sqlalchemy import (
    CTE,
    ColumnElement,
    Select,
    bindparam,
    case,
    func,
    literal_column,
    select,
    true,
)
from sqlalchemy.orm import Session

from registry.database.dialects import in_list, json_list, padded
from registry.database.prepared import Prepared, prepared
from registry.database.prepared import Query as Selection
from registry.database.tables import Channel, Release, ReleaseWord, Score
from registry.domain.access.audit import Actor
from registry.domain.catalog import bases, suites
from registry.domain.catalog.release_rows import CURRENT_SUITES
from registry.domain.search import filters
from registry.domain.search.ordering import Hit, Order, SortKey, by_of
from registry.domain.search.query import Query as Query
from registry.domain.search.query import QueryShape, asks_traits, bind_values, shape_of
from registry.domain.search.term_index import (
    END,
    ENTRIES,
    MORE,
    TermMatches,
    id_bounds,
    iterate_matches,
    most_selective_term,
)
from registry.errors import NotFound

FEW = 16
"""Up to this many trait combinations are merged; beyond it, the page is filled from all releases in order."""
RARE = 500
"""A condition that at most this many releases meet is looked up first; the others are checked on those."""
SIDE_BY_SIDE = 2_000
"""The same for matches that are contiguous in an index: listing this many takes 0.2 ms."""
COMMON, SOON = 10, 3
"""If at least one in COMMON of the newest releases has the word, reading by traits comes first; otherwise after SOON
unsuccessful batches of releases with the word."""

_channel, _release, _score, _word = (table.__table__.c for table in (Channel, Release, Score, ReleaseWord))
_NEWEST_OF_ALL = Prepared(select(func.max(_release.id)))


@dataclass(frozen=True, slots=True)
class SearchResult:
    """`base` is the requested base's (digest, name) if related bases were searched too; `relations` maps their digests
    to the relations."""

    hits: Sequence[Hit]
    base: tuple[str, str] | None = None
    relations: Mapping[str, str] = field(default_factory=dict[str, str])


def search(session: Session, actor: Actor, query: Query, order: Order) -> SearchResult:
    """Searches what the actor may read, in order. Raises NotFound for an unknown base or suite if the actor may list
    those; others get no results."""
    try:
        return _search(session, actor, query, order)
    except NotFound:
        if actor.grants:
            raise
        return SearchResult([])


def _search(session: Session, actor: Actor, query: Query, order: Order) -> SearchResult:
    name = query.base if query.base and bases.is_name(query.base) and not query.related else None
    base = bases.identify(session, query.base) if query.base and not name else None
    relations = bases.related(session, base[0]) if base and query.related else {base[0]: ""} if base else {}
    scored = [suites.find(session, condition.suite).id for condition in query.scores]
    values = bind_values(actor, query, list(relations), scored)
    by, nowhere = by_of(session, order, values), values.get("homes") == []
    if by.column == "id" and "homes" in values:
        values |= id_bounds(session, values)
        nowhere = not values["highest"]
    form = shape_of(query, values)
    hits = [] if nowhere else _find_hits(session, form, by, values | {"limit": order.limit})
    if name and not hits:
        bases.identify(session, name)  # no matches: raises if the base is unknown
    return SearchResult(hits, base, relations)


def _find_hits(session: Session, form: QueryShape, by: SortKey, values: Mapping[str, Any]) -> list[Hit]:
    words = tuple(range(form.entries))
    thinnest: TermMatches | None = None
    if by.column == "id":
        thinnest, words = most_selective_term(session, form, values)
    if thinnest and thinnest.are_all:
        return _among(session, form, by, values, [thinnest.ids])
    for rare in _rare(form, by, words):
        [text] = rare.column(session, values)
        if text is not None:
            ids = orjson.loads(text)
            return _among(session, form, by, values, _newest_first(ids, values) if by.column == "id" else [ids])
    if thinnest:
        return _of_word(session, form, by, values, thinnest)
    few = _of_few_if_few(session, form, by, values)
    if few is not None:
        return few
    of_channel = "channel" in form.asked and not by.of_score
    return by.hits(_of_all(form, replace(by, of_channel=of_channel)).rows(session, values), values["limit"])


def _of_word(
    session: Session, form: QueryShape, by: SortKey, values: Mapping[str, Any], thinnest: TermMatches
) -> list[Hit]:
    """The page from the releases of a word, or from few trait combinations if those are fewer."""
    parts = iterate_matches(session, form, thinnest, values)
    hits: list[Hit] = []
    further: Sequence[int] | None = ()
    by_traits = asks_traits(form)
    if not (by_traits and _is_common(session, thinnest, values)):
        if by_traits and not _any_fits(form).rows(session, values):
            return hits
        hits = _among(session, form, by, values, islice(parts, SOON))
        further = next(parts, None) if len(hits) < values["limit"] else None
    if further is None:
        return hits
    few = _of_few_if_few(session, form, by, values)
    if few is not None:
        return few
    return (hits + _among(session, form, by, values, chain([further], parts)))[: values["limit"]]


def _of_few_if_few(session: Session, form: QueryShape, by: SortKey, values: Mapping[str, Any]) -> list[Hit] | None:
    """The page from the matching trait combinations; None if there are many."""
    pages = _of_few(form, by, FEW).rows(session, values)
    many = any(fitting > FEW for _page, _suites, fitting in pages)
    return None if many else by.hits(pages, values["limit"])


@prepared
def _any_fits(form: QueryShape) -> Selection:
    return filters.matching_traits(form).limit(1)


def _is_common(session: Session, thinnest: TermMatches, values: Mapping[str, Any]) -> bool:
    [newest] = [values["after_id"]] if "after_id" in values else _NEWEST_OF_ALL.column(session, {})
    return newest - thinnest.ids[-1] <= COMMON * thinnest.count


def _among(
    session: Session, form: QueryShape, by: SortKey, values: Mapping[str, Any], parts: Iterable[Sequence[int]]
) -> list[Hit]:
    """The page from lists of releases, each entirely before the next in the order."""
    hits: list[Hit] = []
    for ids in parts:
        if ids:
            pages = _among_rare(form, by).rows(session, {**values, "ids": padded(ids)})
            hits += by.hits(pages, values["limit"])
        if len(hits) >= values["limit"]:
            break
    return hits[: values["limit"]]


def _newest_first(ids: Sequence[int], values: Mapping[str, Any]) -> Iterator[Sequence[int]]:
    """The ids in batches, newest first; the first batch is usually enough."""
    left = sorted({number for number in ids if number < values.get("after_id", END)}, reverse=True)
    count = ENTRIES * values["limit"]
    while left:
        yield left[:count]
        left, count = left[count:], count * MORE


def _rare(form: QueryShape, by: SortKey, words: tuple[int, ...]) -> Iterator[Prepared]:
    """For each condition with its own index, a statement for the releases that meet it, or NULL if there are too many.

    `words` are the numbers of the words to try. Scores are tried among all releases first, then among those with
    matching traits: no score may be good enough, and thousands of trait combinations may match.
    """
    scores = [*enumerate(form.operators)]
    yield from (_with_word(form, number, SIDE_BY_SIDE) for number in words)
    yield from (_with_score(number, operator, SIDE_BY_SIDE) for number, operator in scores)
    if "channel" in form.asked:
        yield _on_channel(RARE)
    if "size" in form.asked:
        yield _small_that_fits(form, RARE)
    if asks_traits(form):
        yield from (_with_score_that_fits(form, number, operator, RARE) for number, operator in scores)


@prepared
def _with_word(form: QueryShape, number: int, most: int) -> Selection:
    return _unless_many(select(_word.release_id.label("id")).where(filters.is_entry(form, number, _word.word)), most)


@prepared
def _with_score(number: int, operator: str, most: int) -> Selection:
    return _unless_many(_scored(number, operator), most)


@prepared
def _with_score_that_fits(form: QueryShape, number: int, operator: str, most: int) -> Selection:
    return _unless_many(_scored(number, operator).where(_score.traits_id.in_(filters.matching_traits(form))), most)


def _scored(number: int, operator: str) -> Selection:
    of_release = select(_score.release_id.label("id")).where(_score.release_id.is_not(None))
    return of_release.where(*filters.score_threshold(number, operator))


@prepared
def _on_channel(most: int) -> Selection:
    of_name = (_channel.name == bindparam("channel"), _channel.served_id.is_not(None))
    return _unless_many(select(_channel.served_id.label("id")).where(*of_name), most)


@prepared
def _small_that_fits(form: QueryShape, most: int) -> Selection:
    small = select(_release.id).where(_release.size_bytes <= bindparam("size"))
    if not asks_traits(form):  # all of the kind match, and SQLite would scan them
        return _unless_many(small.where(filters.traits_match(form, _release.traits_id)), most)
    return _unless_many(small.where(_release.traits_id.in_(filters.matching_traits(form))), most)


def _unless_many(releases: Selection, most: int) -> Selection:
    matching = releases.limit(most + 1).cte("matching")
    ids = func.coalesce(json_list(matching.c.id), "[]")
    return select(case((func.count() <= most, ids))).select_from(matching)


def _each_of_few(form: QueryShape, by: SortKey, few: int) -> Selection:
    """For each matching trait combination, a page of keys and ids, and the number of matches; NULL if there are many.

    One text for each, since SQLite can aggregate an ordered and limited part of an index.
    """
    fitting, count = _fitting(form, few)
    first = by.first(_entries(form, by, fitting, _release.stamp)).correlate(fitting).subquery("first")
    each = select(case((count <= few, by.text(first.c, first.c.stamp).scalar_subquery())), CURRENT_SUITES, count)
    return each.select_from(fitting)


def _all_of_few(form: QueryShape, by: SortKey, few: int) -> Selection:
    """One merged text: PostgreSQL looks up only the stamps of that page."""
    fitting, count = _fitting(form, few)
    of_each = by.first(_entries(form, by, fitting)).lateral("of_each")
    all_first = select(of_each.c.key, of_each.c.id).select_from(fitting.join(of_each, true())).where(count <= few)
    page = by.first_of_all(of_each, all_first).subquery("page")
    stamp = select(_release.stamp).where(_release.id == page.c.id).scalar_subquery()
    return select(by.text(page.c, stamp).scalar_subquery(), CURRENT_SUITES, count)


_of_few = prepared(_each_of_few, postgresql=_all_of_few)


def _fitting(form: QueryShape, few: int) -> tuple[CTE, ColumnElement[int]]:
    """The matching trait combinations, at most `few + 1`, and their number.

    The limit is a literal: a generic plan for a bound limit reads a tenth of the matches, without an index.
    """
    fitting = filters.matching_traits(form).limit(literal_column(str(few + 1))).cte("fitting")
    return fitting, select(func.count()).select_from(fitting).scalar_subquery()


def _entries(form: QueryShape, by: SortKey, fitting: CTE, *more: ColumnElement[Any]) -> Select[*tuple[Any, ...]]:
    return by.select(*more).where(by.traits_id == fitting.c.id, *filters.release_conditions(form))


@prepared
def _of_all(form: QueryShape, by: SortKey) -> Selection:
    """The page from all releases in order. `+ 0` keeps SQLite from collecting and sorting all matches."""
    return by.page(filters.traits_match(form, by.traits_id + 0), *filters.release_conditions(form))


@prepared
def _among_rare(form: QueryShape, by: SortKey) -> Selection:
    asked = (filters.traits_match(form, _release.traits_id), *filters.release_conditions(form))
    return by.page(in_list(by.release_id, "ids"), *asked, in_order=False)
