"""What a search can ask for: the fields of a query, and the condition of each.

Conditions use bind parameters, so that searches of the same shape share statements: building one takes longer than
running it. `filters.py` puts them together.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from operator import eq
from typing import Any

from sqlalchemy import BindParameter, ColumnElement, Select, not_, select

from composer.formats.adapters.serving import Profile
from registry.database.dialects import in_list, in_subquery
from registry.database.tables import Base, Channel, Release, Repository, TargetSet, TargetSetMember, Traits
from registry.domain.catalog import bases
from registry.domain.catalog.repositories import Kind
from registry.domain.catalog.search_index import target_set_key
from registry.domain.catalog.suites import Condition
from registry.formats.licenses import spdx, spellings
from registry.formats.references import RepositoryName

RELATED, REFUSED = "related", "refused"

_base, _channel, _member, _release, _repository, _set, _traits = (
    table.__table__.c for table in (Base, Channel, TargetSetMember, Release, Repository, TargetSet, Traits)
)


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
    loads_in: Profile | None = None
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
    def server(self) -> Profile | None:
        """The server that must load the releases."""
        return None if REFUSED in self.include else self.loads_in

    @cached_property
    def values(self) -> Mapping[str, Any]:
        """The values of the filters that the query has, as drivers take them."""
        filters = {**ON_TRAITS, **ON_RELEASES}.items()
        values = {name: one.value(self) if one.value else getattr(self, name) for name, one in filters}
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return {name: value for name, value in values.items() if value not in (None, []) and value is not False}


@dataclass(frozen=True, slots=True)
class Filter:
    """`condition` makes SQL from a bind parameter of the filter's name; `value` takes what to bind from a query, by
    default its field of that name. If that is None, False or empty, the query does not have the condition."""

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


def _in_repository(*conditions: ColumnElement[bool]) -> ColumnElement[bool]:
    return exists_for_release(select(_repository.id).where(_repository.id == _release.repository_id, *conditions))


def _is_served(channel: BindParameter[Any]) -> ColumnElement[bool]:
    """Whether the channel of the release's repository serves it."""
    of_repository = (_channel.repository_id == _release.repository_id, _channel.name == channel)
    return exists_for_release(select(_channel.id).where(*of_repository, _channel.served_id == _release.id))


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
    "namespaces": Filter(lambda names: _in_repository(in_list(_repository.namespace, names.key)), lambda _: None),
    "repository": Filter(
        lambda name: _in_repository(_repository.name == name), lambda query: query.repository and query.repository.name
    ),
    "channel": Filter(_is_served),
}
"""Conditions on releases beside those on their traits. `namespaces` depends on the actor too."""
