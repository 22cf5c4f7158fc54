"""Searches of the shelf, and any search as one statement over releases, without access paths or interned traits."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from hypothesis import strategies as st
from sqlalchemy import ColumnElement, ScalarSelect, and_, func, select
from sqlalchemy.orm import Session, aliased

from composer.formats.adapters.serving import PROFILES, parse_profile
from registry.database.tables import Base, Channel, Release, ReleaseWord, Repository, Score, Suite, TargetSetMember
from registry.domain.access.audit import Actor
from registry.domain.access.roles import readable
from registry.domain.catalog import bases
from registry.domain.catalog.repositories import Kind
from registry.domain.catalog.search_index import parse_stated, text_terms
from registry.domain.catalog.suites import Condition
from registry.domain.search.ordering import NEWEST, VERSION
from registry.domain.search.query import REFUSED, RELATED, Query
from registry.formats.licenses import spdx
from registry.formats.references import RepositoryName
from tests.registry.shelf import BASES, CHANNELS, METRICS, NAMESPACES, SUITES, TARGETS


def maybe(values: st.SearchStrategy) -> st.SearchStrategy:
    return st.none() | values


def some(values: tuple) -> st.SearchStrategy:
    return st.lists(st.sampled_from(values), max_size=3, unique=True).map(tuple)


NAMES = tuple(sorted({name for targets in TARGETS for name in targets}))
PROFILE_NAMES = [name for name in PROFILES if "<" not in name] + ["vllm:8", "vllm:64"]
conditions = st.builds(
    Condition,
    st.sampled_from(SUITES),
    st.sampled_from([*METRICS, "unmeasured"]),
    st.sampled_from([">=", "<="]),
    st.sampled_from([0.0, 0.3, 0.5, 1.0, 2.0]),
)
STATEMENTS = (
    *("trainer:trl 0.20", "TRAINER:axolotl", "trainer:trl", f"run_url:https://runs.example/{'x' * 300}"),
    *(f"run_url:https://runs.example/{'x' * 299}", "hyperparameters.LR:3e-3", "hyperparameters.modules:v_proj"),
    *("data:tickets", "data:sha256:AB12", "data:ab12", "data_license:cc-by-4.0", "tags:sql", "license:llama3"),
)
TEXTS = (
    *("", "", "", "tick", "TRAINED tick", "grösse", "adapter 1", "acme", "x" * 50, "zebra", "trainer", "axolotl"),
    *("a", "1", "t adapter", "adapter acme", "tickets open grösse"),
)
NOWHERE = ("trainer:trl", f"run_url:https://runs.example/{'x' * 299}")
queries = st.builds(
    Query,
    kind=st.sampled_from([Kind.ADAPTER, Kind.ADAPTER, Kind.ADAPTER, Kind.MODEL]),
    namespace=maybe(st.sampled_from([*NAMESPACES, "nowhere"])),
    repository=maybe(st.builds(RepositoryName, st.sampled_from(NAMESPACES), st.sampled_from(["adapter-0", "model-1"]))),
    base=maybe(st.sampled_from([*BASES, "Hub/plain"])),
    include=some((RELATED, REFUSED)),
    type=maybe(st.sampled_from(["lora", "loha", "other"])),
    variant=maybe(st.sampled_from(["lora", "dora"])),
    dtype=maybe(st.sampled_from(["BF16", "F32"])),
    license=maybe(st.sampled_from(["apache-2.0", "Apache-2.0", "llama3"])),
    base_license=maybe(st.sampled_from(["mit", "Apache-2.0"])),
    alpha=maybe(st.sampled_from([4.0, 8.0, 5.0])),
    min_rank=maybe(st.sampled_from([1, 8, 16])),
    max_rank=maybe(st.sampled_from([3, 8, 64])),
    targets_within=some(NAMES),
    targets_include=some(NAMES),
    targets_exact=st.just(()) | st.sampled_from([tuple(reversed(targets)) for targets in TARGETS]),
    max_size_bytes=maybe(st.sampled_from([1, 10, 1_000])),
    score=st.lists(conditions, max_size=2).map(tuple),
    channel=maybe(st.sampled_from([*CHANNELS, "nowhere"])),
    text=st.sampled_from(TEXTS),
    provenance=some(STATEMENTS),
    loads_in=maybe(st.sampled_from(PROFILE_NAMES).map(parse_profile)),
    include_yanked=st.booleans(),
    stable=st.booleans(),
    latest=st.booleans(),
)

UNSET = (None, False, (), "")
_newer = aliased(Release)


def plain_search(session: Session, actor: Actor, query: Query, order: str, better: bool = True) -> list[int]:
    """The ids of all hits in order; `better` is whether a higher value of the metric in `order` is."""
    given = {one.name: getattr(query, one.name) for one in fields(query)}
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
    keys: dict[str, Any] = {NEWEST: Release.id, VERSION: Release.sort_key}
    if order not in keys:
        statement = statement.join(Score, Score.release_id == Release.id).where(_measures(suite, metric))
    ordered = (keys.get(order, Score.value), Release.id)
    return list(session.scalars(statement.order_by(*(key.desc() if better else key for key in ordered))))


def _measures(suite: str, metric: str) -> ColumnElement[bool]:
    current = select(Suite.id).where(Suite.name == suite, Suite.current).scalar_subquery()
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
