"""Facets of a search: the number of releases that the search would find with each choice of a condition."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from composer.formats.adapters.serving import SERVERS, parse_profile
from registry.database.tables import Base, Channel, Namespace, SuiteMetric, SuiteVersion, Traits
from registry.domain.access.audit import Actor
from registry.domain.access.roles import readable_names
from registry.domain.catalog.metrics import HIGHER_IS_BETTER
from registry.domain.catalog.repositories import Kind
from registry.domain.search.ordering import NEWEST, Order
from registry.domain.search.query import Query
from registry.domain.search.search import count

MOST = 1_000
"""Counts stop at this number."""
CHOICES = 50
"""Maximum choices of a facet that are counted, the first by name."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A value of a facet, and the number of releases with it; there may be `more` than that."""

    value: str
    count: int
    more: bool


@dataclass(frozen=True, slots=True)
class Facet:
    """`values` lists the choices; `chosen` makes a query with one of them in place of its own, and the order to count
    in."""

    values: Callable[[Session, Actor], Iterable[str]]
    chosen: Callable[[Query, str], tuple[Query, str]]


def choices(session: Session, actor: Actor, query: Query, name: str) -> list[Choice]:
    """The choices of a facet that find releases which the actor may read, the most frequent first. The other conditions
    of the query hold."""
    facet = FACETS[name]
    counted: list[Choice] = []
    for value in sorted(facet.values(session, actor))[:CHOICES]:
        chosen, order = facet.chosen(query, value)
        number = count(session, actor, chosen, Order(order, MOST + 1))
        counted.append(Choice(str(value), min(number, MOST), number > MOST))
    return sorted((choice for choice in counted if choice.count), key=lambda one: -one.count)


def _column(names: Select[Any]) -> Callable[[Session, Actor], Sequence[str]]:
    return lambda session, _actor: session.scalars(names.distinct()).all()


def _namespaces(session: Session, actor: Actor) -> Iterable[str]:
    readable = readable_names(actor)
    return session.scalars(select(Namespace.name)) if readable is None else readable


def _measured(session: Session, _actor: Actor) -> set[str]:
    suites = session.scalars(select(SuiteVersion.name).where(SuiteVersion.current)).all()
    others = [
        (metric.suite, metric.metric) for metric in session.scalars(select(SuiteMetric)) if metric.suite in suites
    ]
    return {f"{suite}.{metric}" for suite, metric in [*product(suites, HIGHER_IS_BETTER), *others]}


FACETS: dict[str, Facet] = {
    "base": Facet(
        _column(select(Base.name).where(Base.digest.in_(select(Traits.base_digest)))),
        lambda query, name: (replace(query, base=name), NEWEST),
    ),
    "channel": Facet(_column(select(Channel.name)), lambda query, name: (replace(query, channel=name), NEWEST)),
    "kind": Facet(lambda _session, _actor: list(Kind), lambda query, kind: (replace(query, kind=Kind(kind)), NEWEST)),
    "license": Facet(
        _column(select(Traits.license).where(Traits.license.is_not(None))),
        lambda query, name: (replace(query, license=name), NEWEST),
    ),
    "loads_in": Facet(
        lambda _session, _actor: SERVERS, lambda query, server: (replace(query, loads_in=parse_profile(server)), NEWEST)
    ),
    "measured": Facet(_measured, lambda query, metric: (query, metric)),
    "namespace": Facet(_namespaces, lambda query, name: (replace(query, namespace=name), NEWEST)),
}
"""The facets by the names of their conditions; `measured` counts the releases that have a score SUITE.METRIC."""
