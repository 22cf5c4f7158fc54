"""Cached documents equal newly rendered ones, whichever process changed a release."""

from collections.abc import Callable, Generator

import pytest

from composer.formats.recipes.suite import Suite
from registry.api.routes.documents import RenderedReleaseCache
from registry.database.engine import Database, Session
from registry.database.tables import Release
from registry.domain.catalog import suite_registration, suites
from registry.domain.catalog.suites import Measurement
from registry.domain.channels import withdrawals
from registry.domain.search import search
from registry.domain.search.ordering import Order
from registry.domain.search.query import Query
from tests import services
from tests.registry.shelf import HOST, SUITES, Item, stock

Change = Callable[[Session, Release], object]


@pytest.fixture(params=services.DATABASES)
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return services.new_database_of(request.param, tmp_path_factory.mktemp("documents"), migrated=True)


@pytest.fixture
def database(url: str) -> Generator[Database]:
    opened = Database(url)
    yield opened
    opened.close()


@pytest.fixture
def elsewhere(url: str) -> Generator[Database]:
    """The same registry, as another process has it."""
    opened = Database(url)
    yield opened
    opened.close()


def rendered(database: Database, documents: RenderedReleaseCache, items: list[Item]) -> list[bytes]:
    with database.read() as session:
        hits = search.search(session, HOST, Query(include_yanked=True), Order(limit=1_000)).hits
        stamps = {hit.release_id: hit.stamp for hit in hits}
        return [
            rendered.document
            for rendered in documents.page(session, HOST, {item.id: stamps[item.id] for item in items})
        ]


def measured(value: float) -> Change:
    def record(session: Session, release: Release) -> object:
        suite = suites.find(session, SUITES[0])
        return suites.record(session, HOST, release, [Measurement(suite.digest, "accuracy", value, None, 6, True)])

    return record


def another_suite(session: Session, _release: Release) -> object:
    examples = [{"prompt": "other", "completion": "x"}]
    return suite_registration.add(
        session, HOST, Suite.from_json({"name": SUITES[0], "kind": "target", "chat": False, "examples": examples})
    )


CHANGES: dict[str, Change] = {
    "yanked": lambda session, release: withdrawals.yank(session, HOST, release, "a reason of its own"),
    "and no more": lambda session, release: withdrawals.unyank(session, HOST, release, "it was right"),
    "measured": measured(0.125),
    "measured again": measured(0.375),
    "with another suite": another_suite,
}


@pytest.mark.on("PostgreSQL")
def test_a_change_made_elsewhere_is_rendered_at_once(database: Database, elsewhere: Database) -> None:
    items, documents = stock(database, count=20), RenderedReleaseCache()
    changed = next(item for item in items if not item.yanked)
    before = rendered(database, documents, items)
    assert rendered(database, documents, items) == before
    for name, change in CHANGES.items():
        with elsewhere.write() as session:
            change(session, session.get_one(Release, changed.id))
        after = rendered(database, documents, items)
        assert after == rendered(database, RenderedReleaseCache(), items), name
        assert after[items.index(changed)] != before[items.index(changed)], name
        before = after


def test_what_was_asked_for_last_is_kept_within_bounds(database: Database) -> None:
    items = stock(database, count=20)
    asked, all_kept = rendered(database, RenderedReleaseCache(), items), RenderedReleaseCache()
    assert rendered(database, all_kept, items) == asked
    assert all_kept.kept_bytes > sum(map(len, asked)), "what is around the text takes memory too"
    few = RenderedReleaseCache(max_bytes=all_kept.kept_bytes // 5)
    for _ in range(2):
        assert rendered(database, few, items) == asked
        assert 0 < few.kept_bytes <= few.max_bytes
    tiny = RenderedReleaseCache(max_bytes=10)
    assert rendered(database, tiny, items) == asked
    assert tiny.kept_bytes == 0
