"""Searches releases by base, rank, targets, server, scores and words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import orjson
from sqlalchemy.orm import Session

from registry.domain.access.audit import Actor
from registry.domain.catalog import bases, suites
from registry.domain.search import statement
from registry.domain.search.filters import Bound, bind
from registry.domain.search.ordering import Hit, Order, SortKey, sort_key
from registry.domain.search.query import RELATED, Query
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
    bound = bind(actor, query, list(relations), scored)
    by = sort_key(session, actor, order, bound.values)
    hits = [] if bound.values.get("namespaces") == [] else _first_page(session, bound, by)
    if query.base_name and not hits:
        bases.identify(session, query.base_name)  # no matches: raises if the base is unknown
    return SearchResult(hits, base, relations)


def _first_page(session: Session, bound: Bound, by: SortKey) -> list[Hit]:
    first, number = statement.rarest(session, *bound)
    if not number:
        return []
    [(text, suites)] = statement.page(bound.names, by, first).rows(session, bound.values)
    return [
        Hit(None if by.column == "id" else float(key) if by.column == "value" else key, release_id, (stamp, suites))
        for key, release_id, stamp in orjson.loads(text or "[]")
    ]
