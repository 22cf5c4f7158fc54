"""Searches releases by base, rank, targets, server, scores and words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy.orm import Session

from registry.domain.access.audit import Actor
from registry.domain.catalog import bases, suites
from registry.domain.search.access_paths import PATHS, Search
from registry.domain.search.filters import QueryShape, bind
from registry.domain.search.ordering import Hit, Order, SortKey, by_of
from registry.domain.search.query import RELATED, Query
from registry.domain.search.term_index import id_bounds, most_selective_term
from registry.errors import NotFound


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
    base = bases.identify(session, query.base) if query.base and not query.base_name else None
    relations = bases.related(session, base[0]) if base and RELATED in query.include else {base[0]: ""} if base else {}
    scored = [suites.find(session, condition.suite, actor).id for condition in query.score]
    shape, values = bind(actor, query, list(relations), scored)
    by = by_of(session, actor, order, values)
    hits = [] if values.get("namespaces") == [] else _first_page(session, shape, by, values)
    if query.base_name and not hits:
        bases.identify(session, query.base_name)  # no matches: raises if the base is unknown
    return SearchResult(hits, base, relations)


def _first_page(session: Session, shape: QueryShape, by: SortKey, values: dict[str, Any]) -> list[Hit]:
    term, listed = None, shape.terms
    if by.column == "id":
        values |= id_bounds(session, values) if "homes" in values else {}
        term, listed = most_selective_term(session, shape, values)
    asked = Search(shape, by, values, term, listed)
    return next(hits for path in PATHS if (hits := path(session, asked)) is not None)
