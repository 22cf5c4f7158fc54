"""Searches of the shelf, and any search as one statement over releases, without lookups or interned traits."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from hypothesis import strategies as st
from sqlalchemy import ColumnElement, ScalarSelect, and_, func, select
from sqlalchemy.orm import Session, aliased

from composer.formats.adapters.serving import PROFILES, parse_profile
from registry.database.tables import (
    Base,
    Channel,
    Release,
    ReleaseWord,
    Repository,
    Score,
    SuiteVersion,
    TargetSetMember,
)
from registry.domain.access.audit import Actor
from registry.domain.access.roles import readable
from registry.domain.catalog import bases
from registry.domain.catalog.repositories import Kind
from registry.domain.catalog.search_index import parse_stated, text_terms
from registry.domain.catalog.suites import Condition
from registry.domain.search.ordering import NEWEST, RANK, SIZE, VERSION
from registry.domain.search.query import REFUSED, RELATED, Query
from registry.formats.licenses import spdx
from registry.formats.references import RepositoryName
from tests.registry.shelf import BASES, CHANNELS, METRICS, NAMESPACES, SUITES, TARGETS

NAMES = tuple(sorted({name for targets in TARGETS for name in targets}))
PROFILE_NAMES = [name for name in PROFILES if "<" not in name] + ["vllm:8", "vllm:64"]
THRESHOLDS = (0.0, 0.3, 0.5, 1.0, 2.0)
STATEMENTS = (
    *("trainer:trl 0.20", "TRAINER:axolotl", "trainer:trl", f"run_url:https://runs.example/{'x' * 300}"),
    *(f"run_url:https://runs.example/{'x' * 299}", "hyperparameters.LR:3e-3", "hyperparameters.modules:v_proj"),
    *("data:tickets", "data:sha256:AB12", "data:ab12", "data_license:cc-by-4.0", "tags:sql", "license:llama3"),
)
NOWHERE = ("trainer:trl", f"run_url:https://runs.example/{'x' * 299}")
TEXTS = (
    *("tick", "TRAINED tick", "grösse", "adapter 1", "acme", "x" * 50, "zebra", "trainer", "axolotl"),
    *("a", "1", "t adapter", "adapter acme", "tickets open grösse"),
)

VALUES: dict[str, tuple[Any, ...]] = {
    "kind": (Kind.ADAPTER, Kind.MODEL),
    "namespace": (*NAMESPACES, "nowhere"),
    "repository": tuple(
        RepositoryName(namespace, name) for namespace in NAMESPACES for name in ("adapter-0", "model-1")
    ),
    "base": (*BASES, "Hub/plain"),
    "type": ("lora", "loha", "other"),
    "variant": ("lora", "dora"),
    "dtype": ("BF16", "F32"),
    "license": ("apache-2.0", "Apache-2.0", "llama3"),
    "base_license": ("mit", "Apache-2.0"),
    "alpha": (4.0, 8.0, 5.0),
    "min_rank": (1, 8, 16),
    "max_rank": (3, 8, 64),
    "targets_exact": tuple(tuple(reversed(targets)) for targets in TARGETS),
    "max_size_bytes": (1, 10, 1_000),
    "channel": (*CHANNELS, "nowhere"),
    "text": TEXTS,
    "loads_in": tuple(map(parse_profile, PROFILE_NAMES)),
    "include_yanked": (True,),
    "stable": (True,),
    "latest": (True,),
}
"""Field of a query -> values to try beside its default."""
ITEMS: dict[str, tuple[Any, ...]] = {
    "include": (RELATED, REFUSED),
    "targets_within": NAMES,
    "targets_include": NAMES,
    "score": tuple(
        Condition(suite, metric, operator, value)
        for suite in SUITES
        for metric in (*METRICS, "unmeasured")
        for operator in (">=", "<=")
        for value in THRESHOLDS
    ),
    "provenance": STATEMENTS,
}
"""Field of a query with a list -> items to try, up to three of them."""


def _default(name: str) -> Any:
    return Query.__dataclass_fields__[name].default


queries = st.builds(
    Query,
    **{name: st.just(_default(name)) | st.sampled_from(values) for name, values in VALUES.items()},
    **{name: st.lists(st.sampled_from(items), max_size=3, unique=True).map(tuple) for name, items in ITEMS.items()},
)


def with_each_value(name: str) -> list[Query]:
    """Queries in which one field alone has a value: each that is tried of it, and of a list each item."""
    return [Query(**{name: value}) for value in (*VALUES.get(name, ()), *((item,) for item in ITEMS.get(name, ())))]


UNSET = (None, False, (), "")
_newer = aliased(Release)


def plain_search(session: Session, actor: Actor, query: Query, order: str, better: bool = True) -> list[int]:
    """The ids of all hits in order; `better` is whether a higher value of the metric in `order` is."""
    given = {field.name: getattr(query, field.name) for field in fields(query)}
    asked = [
        condition(given[name]) for name, condition in CONDITIONS.items() if given[name] not in (None, False, (), "")
    ]
    if query.base:
        digest, _ = bases.identify(session, query.base)
        asked.append(Release.base_digest.in_(bases.related(session, digest) if RELATED in query.include else [digest]))
    if query.loads_in and REFUSED not in query.include:
        asked.append(Release.servers.bitwise_and(query.loads_in.bit) != 0)
        asked += [] if query.loads_in.max_rank is None else [Release.rank_max <= query.loads_in.max_rank]
    if not query.include_yanked:
        asked.append(~Release.yanked)
    statement = select(Release.id).join(Release.repository).where(readable(actor, Repository.namespace), *asked)
    suite, _, metric = order.rpartition(".")
    keys: dict[str, Any] = {
        NEWEST: Release.id,
        VERSION: Release.sort_key,
        SIZE: Release.size_bytes,
        RANK: Release.rank_max,
    }
    if order == RANK:
        statement = statement.where(Release.rank_max.is_not(None))
    if order not in keys:
        statement = statement.join(Score, Score.release_id == Release.id).where(_measures(suite, metric))
    ordered = (keys.get(order, Score.value), Release.id)
    return list(
        session.scalars(
            statement.order_by(*(key.desc() if better and order not in (SIZE, RANK) else key for key in ordered))
        )
    )


def _measures(suite: str, metric: str) -> ColumnElement[bool]:
    current = select(SuiteVersion.id).where(SuiteVersion.name == suite, SuiteVersion.current).scalar_subquery()
    return and_(Score.suite_id == current, Score.metric == metric)


def _scores(conditions: tuple[Condition, ...]) -> ColumnElement[bool]:
    def scores(one: Condition) -> ColumnElement[bool]:
        holds = Score.value >= one.value if one.operator == ">=" else Score.value <= one.value
        return Release.id.in_(select(Score.release_id).where(_measures(one.suite, one.metric), holds))

    return and_(*map(scores, conditions))


def _has_word(matches: ColumnElement[bool]) -> ColumnElement[bool]:
    return Release.id.in_(select(ReleaseWord.release_id).where(matches))


def _targets(*among: ColumnElement[bool]) -> ScalarSelect[int]:
    of_set = select(func.count()).where(TargetSetMember.target_set_id == Release.target_set_id, *among)
    return of_set.correlate(Release).scalar_subquery()


def _targets_in(names: tuple[str, ...]) -> ScalarSelect[int]:
    return _targets(TargetSetMember.target.in_(names))


CONDITIONS: dict[str, Callable[[Any], ColumnElement[bool]]] = {
    "kind": lambda kind: Repository.kind == str(kind),
    "namespace": lambda name: Repository.namespace == name,
    "repository": lambda name: and_(Repository.namespace == name.namespace, Repository.name == name.name),
    **{
        name: lambda value, name=name: getattr(Release, name) == value for name in ("type", "variant", "dtype", "alpha")
    },
    "license": lambda name: Release.license.in_({name, spdx(name), spdx(name).lower()}),
    "base_license": lambda name: Release.base_digest.in_(select(Base.digest).where(Base.license == spdx(name))),
    "min_rank": lambda rank: Release.rank_max >= rank,
    "max_rank": lambda rank: Release.rank_max <= rank,
    "targets_within": lambda names: and_(_targets() > 0, _targets_in(names) == _targets()),
    "targets_include": lambda names: _targets_in(names) == len(set(names)),
    "targets_exact": lambda names: and_(_targets() == len(set(names)), _targets_in(names) == _targets()),
    "max_size_bytes": lambda size: Release.size_bytes <= size,
    "score": _scores,
    "channel": lambda name: Release.id.in_(select(Channel.served_id).where(Channel.name == name)),
    "text": lambda text: and_(
        *(_has_word(ReleaseWord.word.startswith(word, autoescape=True)) for word in text_terms(text))
    ),
    "provenance": lambda texts: and_(*(_has_word(ReleaseWord.word == parse_stated(text)) for text in texts)),
    "stable": lambda _: and_(Release.stable),
    "latest": lambda _: and_(
        Release.stable,
        ~Release.yanked,
        ~select(_newer.id)
        .where(_newer.repository_id == Release.repository_id, _newer.stable, ~_newer.yanked)
        .where(_newer.sort_key > Release.sort_key)
        .exists(),
    ),
}
"""Field of a query -> the condition for its value."""
