"""The fields of a search query, and the condition of each.

Conditions use bind parameters, so that searches of the same shape share statements: building one takes longer than
running it. `filters.py` puts them together.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from operator import eq
from typing import Any

from sqlalchemy import BindParameter, ColumnElement, Select, bindparam, not_, select

from composer.formats.adapters.serving import ServerProfile
from registry.database.dialects import in_list, in_set, in_subquery
from registry.database.tables import (
    Base,
    Channel,
    Release,
    ReleaseWord,
    Repository,
    Score,
    TargetSet,
    TargetSetMember,
    Traits,
)
from registry.domain.catalog import bases
from registry.domain.catalog.repositories import Kind
from registry.domain.catalog.search_index import target_set_key
from registry.domain.catalog.suites import Condition
from registry.formats.licenses import spdx, spellings
from registry.formats.references import RepositoryName

RELATED, REFUSED = "related", "refused"

_base, _channel, _member, _release, _repository = (
    table.__table__.c for table in (Base, Channel, TargetSetMember, Release, Repository)
)
_score, _set, _traits, _word = (table.__table__.c for table in (Score, TargetSet, Traits, ReleaseWord))

Lookup = Select[*tuple[Any, ...]]
"""A statement for the ids of the releases that meet one condition."""


@dataclass(frozen=True)
class Query:
    """All conditions must hold; None and () mean no condition. The fields have the names of REST's parameters.

    `include` may have RELATED, for releases for casts and quantizations of `base` too, and REFUSED, for those that
    `loads_in` cannot load too. `latest` finds only the highest stable release of each repository. `provenance` has
    texts `NAME:VALUE` for `search_index.parse_stated`.
    """

    kind: Kind = Kind.ADAPTER
    namespace: str | None = None
    repository: RepositoryName | None = None
    base: str | None = None
    include: Sequence[str] = ()
    type: str | None = None
    variant: str | None = None
    dtype: str | None = None
    license: str | None = None
    base_license: str | None = None
    alpha: float | None = None
    min_rank: int | None = None
    max_rank: int | None = None
    targets_within: Sequence[str] = ()
    targets_include: Sequence[str] = ()
    targets_exact: Sequence[str] = ()
    max_size_bytes: int | None = None
    score: Sequence[Condition] = ()
    channel: str | None = None
    text: str = ""
    provenance: Sequence[str] = ()
    loads_in: ServerProfile | None = None
    include_yanked: bool = False
    stable: bool = False
    latest: bool = False

    @property
    def base_name(self) -> str | None:
        """The base if it is a name, which saves most searches a statement: a digest may be ambiguous or have related
        bases."""
        by_name = self.base and bases.is_name(self.base) and RELATED not in self.include
        return self.base if by_name else None

    @property
    def server(self) -> ServerProfile | None:
        """The server that must load the releases."""
        return None if REFUSED in self.include else self.loads_in

    @cached_property
    def values(self) -> Mapping[str, Any]:
        """The values of the filters that the query has, as drivers take them."""
        filters = {**ON_TRAITS, **ON_RELEASES}.items()
        values = {name: filter_.value(self) if filter_.value else getattr(self, name) for name, filter_ in filters}
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return {name: value for name, value in values.items() if value not in (None, []) and value is not False}


@dataclass(frozen=True, slots=True)
class Filter:
    """`condition` makes SQL from a bind parameter of the filter's name; `value` reads the value to bind from a query,
    by default its field of that name. If that is None, False or empty, the query does not have the condition."""

    condition: Callable[[BindParameter[Any]], ColumnElement[bool]]
    value: Callable[[Query], Any] | None = None


def exists_for_release(rows: Select[*tuple[Any, ...]]) -> ColumnElement[bool]:
    """Whether such rows exist for the release. Correlates only the release, since the outer query may have scores too.

    OFFSET 0 makes PostgreSQL look them up for each release read in order. Otherwise its generic plan assumes a rare
    word and a long page, and collects and sorts all matches.
    """
    return rows.correlate(Release.__table__).offset(0).exists()


def _has_targets(sets: Select[*tuple[Any, ...]]) -> ColumnElement[bool]:
    return in_subquery(_traits.target_set_id, sets)


def has_target(name: BindParameter[Any]) -> ColumnElement[bool]:
    """The condition for one of `targets_include`."""
    return _has_targets(select(_member.target_set_id).where(_member.target == name))


def _within(names: BindParameter[Any]) -> Select[*tuple[Any, ...]]:
    """Sets that contain at least one of the names and no others; starts from the names, not from all sets."""
    other = TargetSetMember.__table__.alias()
    of_set = other.c.target_set_id == _member.target_set_id
    outside = select(other.c.target).where(of_set, not_(in_list(other.c.target, names.key)))
    return select(_member.target_set_id).where(in_list(_member.target, names.key), ~outside.exists())


def _part(bound: BindParameter[Any], name: str) -> BindParameter[Any]:
    """A further parameter of the same condition."""
    return bindparam(f"{bound.key}_{name}")


def _scored(limit: BindParameter[Any]) -> Lookup:
    measured = (_score.suite_id == _part(limit, "suite"), _score.metric == _part(limit, "metric"))
    return select(_score.release_id).where(*measured, _score.release_id.is_not(None))


def _newer_stable_exists() -> ColumnElement[bool]:
    higher = Release.__table__.alias().c
    same = (higher.repository_id == _release.repository_id) & (higher.sort_key > _release.sort_key)
    return select(higher.id).where(same, higher.stable, ~higher.yanked).exists()


ON_TRAITS: dict[str, Filter] = {
    "kind": Filter(lambda kind: _traits.kind == kind, lambda query: str(query.kind)),
    "base_name": Filter(lambda name: _traits.base_digest == bases.digest_of(name)),
    "base_digests": Filter(lambda digests: in_list(_traits.base_digest, digests.key), lambda _: None),
    **{name: Filter(partial(eq, _traits[name])) for name in ("type", "variant", "dtype", "alpha")},
    "license": Filter(
        lambda names: in_list(_traits.license, names.key), lambda query: query.license and spellings(query.license)
    ),
    "base_license": Filter(
        lambda name: in_subquery(_traits.base_digest, select(_base.digest).where(_base.license == name)),
        lambda query: query.base_license and spdx(query.base_license),
    ),
    "min_rank": Filter(lambda rank: _traits.rank_max >= rank),
    "max_rank": Filter(lambda rank: _traits.rank_max <= rank),
    "server": Filter(
        lambda bit: _traits.servers.bitwise_and(bit) != 0, lambda query: query.server and query.server.bit
    ),
    "server_rank": Filter(lambda rank: _traits.rank_max <= rank, lambda query: query.server and query.server.max_rank),
    "targets_within": Filter(lambda names: _has_targets(_within(names))),
    "targets_exact": Filter(
        lambda key: _has_targets(select(_set.id).where(_set.key == key)),
        lambda query: query.targets_exact and target_set_key(query.targets_exact),
    ),
}
"""Conditions on traits, which releases share. A base that is not given by name is bound as `base_digests`."""

ON_RELEASES: dict[str, Filter] = {
    # A yanked release is never the latest.
    "not_yanked": Filter(lambda _: ~_release.yanked, lambda query: query.latest or not query.include_yanked),
    "stable": Filter(lambda _: _release.stable.is_(True), lambda query: query.latest or query.stable),
    "latest": Filter(lambda _: ~_newer_stable_exists()),
    "max_size_bytes": Filter(lambda size: _release.size_bytes <= size),
    "namespaces": Filter(
        lambda names: in_set(
            _release.repository_id, select(_repository.id).where(in_list(_repository.namespace, names.key))
        ),
        lambda _: None,
    ),
    "repository": Filter(
        lambda name: exists_for_release(
            select(_repository.id).where(_repository.id == _release.repository_id, _repository.name == name)
        ),
        lambda query: query.repository and query.repository.name,
    ),
}
"""Conditions on releases besides those on their traits. `namespaces` depends on the actor too."""

LOOKUPS: dict[str, Callable[[BindParameter[Any]], Lookup]] = {
    "word": lambda word: select(_word.release_id).where(_word.word.between(word, _part(word, "end"))),
    "stated": lambda entry: select(_word.release_id).where(_word.word == entry),
    "at_least": lambda limit: _scored(limit).where(_score.value >= limit),
    "at_most": lambda limit: _scored(limit).where(_score.value <= limit),
    "channel": lambda name: select(_channel.served_id).where(_channel.name == name, _channel.served_id.is_not(None)),
}
"""Conditions on rows that name releases, as statements for their ids: an index has the rows of each value together. A
query may have several of a kind, so their parameters are numbered."""
