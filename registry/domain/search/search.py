"""Searches releases by base, rank, targets, server, scores and words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import orjson
from sqlalchemy.orm import Session

from registry.domain.access.audit import Actor
from registry.domain.catalog import bases, suites
from registry.domain.search import statement
from registry.domain.search.filters import bind
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
        bound = _bind(session, actor, query, order)
        hits = _page(session, bound) if bound.possible else []
        if query.base_name and not hits:
            bases.identify(session, query.base_name)  # no matches: raises if the base is unknown
        return SearchResult(hits, bound.base, bound.relations)
    except NotFound:
        if actor.grants:
            raise
        return SearchResult([])


def count(session: Session, actor: Actor, query: Query, order: Order) -> int:
    """The number of hits that `search` returns; 0 for an unknown base or suite."""
    try:
        bound = _bind(session, actor, query, order)
    except NotFound:
        return 0
    if not bound.possible:
        return 0
    return statement.count(bound.names, bound.by, bound.first).column(session, bound.values)[0]


class _BoundQuery(NamedTuple):
    """A bound query and order. `possible` is false if no release can match; `first` is the condition to look up
    first."""

    names: tuple[str, ...]
    values: dict[str, Any]
    by: SortKey
    possible: bool
    first: str | None
    base: tuple[str, str] | None
    relations: Mapping[str, str]


def _bind(session: Session, actor: Actor, query: Query, order: Order) -> _BoundQuery:
    base = bases.identify(session, query.base) if query.base and not query.base_name else None
    relations = bases.related(session, base[0]) if base and RELATED in query.include else {base[0]: ""} if base else {}
    scored = [suites.find(session, condition.suite, actor).id for condition in query.score]
    names, values = bind(actor, query, list(relations), scored)
    by = sort_key(session, actor, order, values)
    first, number = (None, 0) if values.get("namespaces") == [] else statement.rarest(session, names, values)
    return _BoundQuery(names, values, by, number > 0, first, base, relations)


def _page(session: Session, bound: _BoundQuery) -> list[Hit]:
    column = bound.by.column
    [(text, suites)] = statement.page(bound.names, bound.by, bound.first).rows(session, bound.values)
    return [
        Hit(None if column == "id" else float(key) if column == "value" else key, release_id, (stamp, suites))
        for key, release_id, stamp in orjson.loads(text or "[]")
    ]
