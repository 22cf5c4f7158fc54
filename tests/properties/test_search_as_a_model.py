"""Every search beside the same search over plain values, by loops that know nothing of traits, indexes and SQL.

A search has several ways to its answer, so that a page costs little whatever is asked. Which one is taken must not
matter: each is also forced upon it.
"""

import re
import unicodedata
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from composer.formats.adapters.serving import PROFILES, Profile, parse_profile
from registry.database.engine import Database
from registry.domain.access.audit import Actor
from registry.domain.access.roles import EVERYWHERE
from registry.domain.catalog.repositories import Kind
from registry.domain.catalog.suites import Condition
from registry.domain.search import search, term_index
from registry.domain.search.ordering import NEWEST, VERSION, Order
from registry.domain.search.search import Query
from registry.formats.references import RepositoryName
from tests.registry.shelf import BASES, CHANNELS, METRICS, NAMESPACES, RELATIONS, SUITES, TARGETS, Item, stock

NOW = datetime(2026, 2, 1, tzinfo=UTC)
ACTORS = (
    Actor("host", NOW, {EVERYWHERE: "admin"}),
    Actor("reader", NOW, {"acme": "reader"}, frozenset({"open"})),
    Actor("nobody", NOW, {}),
)


@dataclass(frozen=True)
class Shelf:
    database: Database = field(repr=False)
    items: list[Item] = field(repr=False)


@pytest.fixture(scope="module")
def shelf(migrated: Database) -> Shelf:
    return Shelf(migrated, stock(migrated))


WAYS: dict[str, dict[str, int]] = {
    "as it is": {},
    "all in order": {"FEW": 0, "RARE": 0, "SIDE_BY_SIDE": 0, "SERVED": 0, "MANY_WORDS": 0},
    "little at a time": {"FEW": 0, "RARE": 0, "SIDE_BY_SIDE": 0, "SERVED": 0, "ENTRIES": 1, "MORE": 2},
    "few are few": {
        "FEW": 2,
        "RARE": 3,
        "SIDE_BY_SIDE": 3,
        "SERVED": 3,
        "MANY_WORDS": 1,
        "ENTRIES": 1,
        "MORE": 1,
        "SOON": 1,
        "COMMON": 2,
    },
}


@pytest.fixture(params=[*WAYS.values()], ids=[*WAYS])
def ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in request.param.items():
        for module in [one for one in (search, term_index) if hasattr(one, name)]:
            monkeypatch.setattr(module, name, value)


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
    related=st.booleans(),
    type=maybe(st.sampled_from(["lora", "loha", "other"])),
    variant=maybe(st.sampled_from(["lora", "dora"])),
    dtype=maybe(st.sampled_from(["BF16", "F32"])),
    license=maybe(st.sampled_from(["apache-2.0", "llama3"])),
    alpha=maybe(st.sampled_from([4.0, 8.0, 5.0])),
    min_rank=maybe(st.sampled_from([1, 8, 16])),
    max_rank=maybe(st.sampled_from([3, 8, 64])),
    targets_within=some(NAMES),
    targets_include=some(NAMES),
    targets_exact=st.just(()) | st.sampled_from([tuple(reversed(targets)) for targets in TARGETS]),
    max_size_bytes=maybe(st.sampled_from([1, 10, 1_000])),
    scores=st.lists(conditions, max_size=2).map(tuple),
    channel=maybe(st.sampled_from([*CHANNELS, "nowhere"])),
    text=st.sampled_from(TEXTS),
    provenance=some(STATEMENTS),
    loads_in=maybe(st.sampled_from(PROFILE_NAMES).map(parse_profile)),
    explain=st.booleans(),
    include_yanked=st.booleans(),
    stable=st.booleans(),
    latest=st.booleans(),
)
# All of that together finds nothing: most queries ask for a few things.
FIELDS = [name for name in Query.__dataclass_fields__ if name != "kind"]
few_things = st.builds(
    lambda query, kept: replace(Query(kind=query.kind), **{name: getattr(query, name) for name in kept}),
    queries,
    st.lists(st.sampled_from(FIELDS), max_size=4, unique=True),
)
orders = st.sampled_from([NEWEST, VERSION, "sql-exact.accuracy", "guard.nll", "guard.unmeasured"])


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(query=few_things | queries, order=orders, actor=st.sampled_from(ACTORS), limit=st.sampled_from([1, 3, 50, 500]))
@example(query=Query(channel="prod"), order=NEWEST, actor=ACTORS[0], limit=3)
@example(query=Query(channel="prod", include_yanked=True), order=VERSION, actor=ACTORS[0], limit=50)
@example(query=Query(base="plain", related=True), order="guard.nll", actor=ACTORS[1], limit=3)
@example(query=Query(text="a adapter"), order=NEWEST, actor=ACTORS[1], limit=3)
@example(query=Query(text="tick", base="plain"), order=NEWEST, actor=ACTORS[0], limit=1)
@example(query=Query(text="a", type="lora"), order=NEWEST, actor=ACTORS[0], limit=3)
@example(query=Query(), order=VERSION, actor=ACTORS[1], limit=3)
def test_a_search_finds_what_a_look_at_every_release_finds_page_by_page(
    shelf: Shelf, ways: None, query: Query, order: str, actor: Actor, limit: int
) -> None:
    expected = [item.id for item in _expected(shelf.items, query, order, actor)]
    assert _all_pages(shelf.database, query, order, actor, limit) == expected


@pytest.mark.parametrize("order", [NEWEST, VERSION, "sql-exact.accuracy", "guard.nll"])
def test_the_model_and_the_registry_agree_on_something(shelf: Shelf, order: str) -> None:
    """A model that finds nothing would agree with everything."""
    for query in (
        Query(),
        Query(base="plain", max_rank=16, targets_within=("q_proj", "v_proj")),
        Query(base="quantized", related=True),
        Query(channel="prod"),
        Query(text="tick"),
        *(Query(provenance=(text,)) for text in STATEMENTS if text not in NOWHERE),
        Query(latest=True),
        Query(latest=True, include_yanked=True),
        Query(loads_in=Profile("vllm", 16)),
        Query(scores=(Condition("sql-exact", "accuracy", ">=", 0.5),)),
    ):
        found = _all_pages(shelf.database, query, order, ACTORS[0], 7)
        assert found == [item.id for item in _expected(shelf.items, query, order, ACTORS[0])]
        assert found


def _all_pages(database: Database, query: Query, order: str, actor: Actor, limit: int) -> list[int]:
    found: list[int] = []
    after = None
    while True:
        with database.read() as session:
            places = search.search(session, actor, query, Order(order, limit, after)).hits
        found += [place.release_id for place in places]
        if len(places) < limit:
            return found
        after = places[-1]


def _expected(items: list[Item], query: Query, order: str, actor: Actor) -> list[Item]:
    names = {*actor.grants, *actor.public}
    visible = [item for item in items if EVERYWHERE in names or item.repository.namespace in names]
    fitting = [item for item in visible if _fits(item, query) and _is_named(item, query)]
    if query.latest:
        fitting = [item for item in fitting if _is_latest(item, items)]
    if order == NEWEST:
        return sorted(fitting, key=lambda item: -item.id)
    if order == VERSION:
        return sorted(fitting, key=lambda item: (item.version, item.id), reverse=True)
    suite, _, metric = order.rpartition(".")
    scored = [item for item in fitting if (suite, metric) in item.scores]
    down = METRICS.get(metric, True)
    return sorted(scored, key=lambda item: (item.scores[suite, metric], item.id), reverse=down)


def _is_latest(item: Item, items: list[Item]) -> bool:
    rivals = [
        one.version for one in items if one.repository == item.repository and one.version.stable and not one.yanked
    ]
    return item.version.stable and not item.yanked and item.version >= max(rivals)


def _is_named(item: Item, query: Query) -> bool:
    text = f"{item.repository.namespace} {item.repository.name} {item.notes}"
    held = _words(text)
    return (
        item.kind == query.kind
        and query.namespace in (None, item.repository.namespace)
        and query.repository in (None, item.repository)
        and (query.channel is None or query.channel in item.served)
        and all(any(word.startswith(asked) for word in held) for asked in _words(query.text))
        and all(_states(item, *text.lower().split(":", 1)) for text in query.provenance)
        and (query.include_yanked or not item.yanked)
        and (item.version.stable or not query.stable)
    )


def _states(item: Item, name: str, value: str) -> bool:
    stated: dict = {"license": item.license, **item.provenance}
    data = stated.get("data", [])
    if name.startswith("hyperparameters."):
        given = stated.get("hyperparameters", {}).get(name.removeprefix("hyperparameters."))
        return value in given if isinstance(given, list) else given is not None and float(given) == float(value)
    held = {
        "data": [row.get(part) for row in data for part in ("name", "digest")],
        "data_license": [row.get("license") for row in data],
        "tags": stated.get("tags", []),
    }.get(name, [stated.get(name)])
    return value in [str(one).lower() for one in held if one]


def _words(text: str) -> list[str]:
    return [word[:40] for word in re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).casefold())]


def _fits(item: Item, query: Query) -> bool:
    facts = item.facts
    rank, targets = facts.get("rank_max"), set(facts.get("targets", ()))  # type: ignore[call-overload]
    return (
        (query.base is None or item.base in _bases(query))
        and all(
            asked in (None, given)
            for asked, given in (
                (query.type, facts["type"]),
                (query.variant, facts["variant"]),
                (query.dtype, facts["dtype"]),
                (query.license, item.license),
                (query.alpha, facts.get("alpha")),
            )
        )
        and (query.min_rank is None or (rank is not None and rank >= query.min_rank))  # type: ignore[operator]
        and (query.max_rank is None or (rank is not None and rank <= query.max_rank))  # type: ignore[operator]
        and (not query.targets_within or (bool(targets) and targets <= set(query.targets_within)))
        and targets >= set(query.targets_include)
        and (not query.targets_exact or targets == set(query.targets_exact))
        and (query.max_size_bytes is None or item.size_bytes <= query.max_size_bytes)
        and _loads(item, rank, query)
        and all(
            (condition.suite, condition.metric) in item.scores
            and condition.holds(item.scores[condition.suite, condition.metric])
            for condition in query.scores
        )
    )


def _loads(item: Item, rank: object, query: Query) -> bool:
    if query.loads_in is None or query.explain:
        return True
    limit = query.loads_in.max_rank
    within = limit is None or (isinstance(rank, int) and rank <= limit)
    return bool(item.servers & query.loads_in.bit) and within


def _bases(query: Query) -> set[str]:
    found = {str(query.base).removeprefix("Hub/")}
    while query.related:
        more = {
            there
            for made, (origin, relation) in RELATIONS.items()
            if relation in ("cast", "quantized")
            for here, there in ((made, origin), (origin, made))
            if here in found
        }
        if more <= found:
            break
        found |= more
    return found
