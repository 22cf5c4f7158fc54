"""Every search compared with the same search as one plain statement, and words compared with the texts of releases. A
search first looks up a condition that few releases meet. This must not affect the result: each way is also forced."""

import os
import re
import unicodedata
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from composer.formats.adapters.serving import ServerProfile
from registry.database.engine import Database
from registry.domain.access.audit import Actor
from registry.domain.access.roles import EVERYWHERE
from registry.domain.catalog.suites import Condition
from registry.domain.search import facets, search, statement
from registry.domain.search.ordering import NEWEST, RANK, SIZE, VERSION, Order
from registry.domain.search.query import RELATED, Query
from tests.doses import each_value_once
from tests.registry.searches import NOWHERE, STATEMENTS, plain_search, queries, with_each_value
from tests.registry.shelf import METRICS, Item, stock

EXAMPLES = 12 * min(4, int(os.environ.get("ADAPTORY_TEST_FUZZ", "1")))
NOW = datetime(2026, 2, 1, tzinfo=UTC)
ACTORS = (
    Actor("host", NOW, {EVERYWHERE: "admin"}),
    Actor("reader", NOW, {"acme": "reader"}, public=frozenset({"open"})),
    Actor("nobody", NOW, {}),
)


@dataclass(frozen=True)
class Shelf:
    database: Database = field(repr=False)
    items: list[Item] = field(repr=False)


@pytest.fixture(scope="module")
def shelf(migrated: Database) -> Shelf:
    return Shelf(migrated, stock(migrated))


@pytest.fixture(params=[statement.FEW, 0, 3], ids=["as it is", "all in order", "few are few"])
def ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statement, "FEW", request.param)


# All of that together finds nothing: most queries have a few conditions.
FIELDS = [name for name in Query.__dataclass_fields__ if name != "kind"]
few_things = st.builds(
    lambda query, kept: replace(Query(kind=query.kind), **{name: getattr(query, name) for name in kept}),
    queries,
    st.lists(st.sampled_from(FIELDS), max_size=4, unique=True),
)
orders = st.sampled_from([NEWEST, VERSION, SIZE, RANK, "sql-exact.accuracy", "guard.nll", "guard.unmeasured"])


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(query=few_things | queries, order=orders, actor=st.sampled_from(ACTORS), limit=st.sampled_from([1, 3, 50, 500]))
@example(query=Query(channel="prod"), order=NEWEST, actor=ACTORS[0], limit=3)
@example(query=Query(channel="prod", include_yanked=True), order=VERSION, actor=ACTORS[0], limit=50)
@example(query=Query(base="plain", include=(RELATED,)), order="guard.nll", actor=ACTORS[1], limit=3)
@example(query=Query(text="a adapter"), order=NEWEST, actor=ACTORS[1], limit=3)
@example(query=Query(text="tick", base="plain"), order=NEWEST, actor=ACTORS[0], limit=1)
@example(query=Query(text="a", type="lora"), order=NEWEST, actor=ACTORS[0], limit=3)
@example(query=Query(), order=VERSION, actor=ACTORS[1], limit=3)
def test_a_search_finds_what_a_look_at_every_release_finds_page_by_page(
    shelf: Shelf, ways: None, query: Query, order: str, actor: Actor, limit: int
) -> None:
    assert _all_pages(shelf.database, query, order, actor, limit) == _expected(shelf, query, order, actor)


@pytest.mark.parametrize("order", [NEWEST, VERSION, SIZE, RANK, "sql-exact.accuracy", "guard.nll"])
def test_the_model_and_the_registry_agree_on_something(shelf: Shelf, order: str) -> None:
    """A model that finds nothing would agree with everything."""
    for query in (
        Query(),
        Query(base="plain", max_rank=16, targets_within=("q_proj", "v_proj")),
        Query(base="quantized", include=(RELATED,)),
        Query(channel="prod"),
        Query(text="tick"),
        *(Query(provenance=(text,)) for text in STATEMENTS if text not in NOWHERE),
        Query(latest=True),
        Query(latest=True, include_yanked=True),
        Query(loads_in=ServerProfile("vllm", 16)),
        Query(score=(Condition("sql-exact", "accuracy", ">=", 0.5),)),
    ):
        listed = _all_pages(shelf.database, query, order, ACTORS[0], 7)
        assert listed == _expected(shelf, query, order, ACTORS[0])
        assert listed


# `include` widens another condition.
@pytest.mark.parametrize("name", sorted(Query.__dataclass_fields__.keys() - {"include"}))
def test_each_condition_alone_finds_what_a_look_at_every_release_finds(shelf: Shelf, name: str) -> None:
    results: list[list[int]] = []
    for query in [Query(), *with_each_value(name)]:
        results.append(_all_pages(shelf.database, query, NEWEST, ACTORS[0], 500))
        assert results[-1] == _expected(shelf, query, NEWEST, ACTORS[0]), query
    assert len(set(map(tuple, results))) > 1, "no value that is tried makes a difference"


@pytest.mark.parametrize(
    ("name", "query"),
    each_value_once(
        facets.FACETS, [Query(), Query(license="apache-2.0", channel="prod"), Query(text="tick", max_rank=8)]
    ),
)
@pytest.mark.parametrize("actor", ACTORS, ids=lambda actor: actor.name)
def test_a_choice_of_a_facet_finds_as_many_as_it_counts(
    shelf: Shelf, name: str, query: Query, actor: Actor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(facets, "MOST", 5)
    with shelf.database.read() as session:
        choices = facets.choices(session, actor, query, name)
    for choice in choices:
        chosen, order = facets.FACETS[name].chosen(query, choice.value)
        listed = _all_pages(shelf.database, chosen, order, actor, 50)
        assert (choice.count, choice.more) == (min(len(listed), 5), len(listed) > 5), choice
        assert listed == _expected(shelf, chosen, order, actor)
    assert bool(choices) == bool(actor.grants)


def _all_pages(database: Database, query: Query, order: str, actor: Actor, limit: int) -> list[int]:
    listed: list[int] = []
    after = None
    while True:
        with database.read() as session:
            hits = search.search(session, actor, query, Order(order, limit, after)).hits
        listed += [hit.release_id for hit in hits]
        if len(hits) < limit:
            return listed
        after = hits[-1]


def _expected(shelf: Shelf, query: Query, order: str, actor: Actor) -> list[int]:
    """The results of the plain statement without words, filtered by the texts of the releases."""
    items = {item.id: item for item in shelf.items}
    with shelf.database.read() as session:
        without_words = replace(query, text="", provenance=())
        ids = plain_search(session, actor, without_words, order, METRICS.get(order.rpartition(".")[2], True))
    return [number for number in ids if _is_named(items[number], query)]


def _is_named(item: Item, query: Query) -> bool:
    held = _words(f"{item.repository.namespace} {item.repository.name} {item.notes}")
    return all(any(word.startswith(asked) for word in held) for asked in _words(query.text)) and all(
        _states(item, *text.lower().split(":", 1)) for text in query.provenance
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
    return value in [str(stated).lower() for stated in held if stated]


def _words(text: str) -> list[str]:
    return [word[:40] for word in re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).casefold())]
