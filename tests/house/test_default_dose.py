"""`make test` runs every story, in one of the ways that it can run in."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

from tests import conftest, services


@dataclass
class Story:
    """An item with marks: a part of `pytest.Item`."""

    nodeid: str
    marks: list[pytest.Mark] = field(default_factory=list[pytest.Mark])
    path = Path("test_stories.py")

    def get_closest_marker(self, name: str) -> pytest.Mark | None:
        return next((mark for mark in self.marks if mark.name == name), None)

    def add_marker(self, mark: pytest.MarkDecorator) -> None:
        self.marks.append(mark.mark)


@pytest.mark.parametrize(
    ("on", "expected"), [(None, "embedded"), ("SQLite", "SQLite and a directory"), ("PostgreSQL", "PostgreSQL and S3")]
)
def test_a_story_runs_by_default_in_its_first_way_or_in_the_one_that_it_is_marked_with(
    on: str | None, expected: str
) -> None:
    marks = [pytest.mark.on(on).mark] if on else []
    ways = {way: Story(f"test_story[{way}]", [*marks]) for way in ("embedded", *services.PAIRINGS)}
    conftest._mark_further_ways(cast(list[Any], list(ways.values())))
    assert [way for way, story in ways.items() if not story.get_closest_marker("long")] == [expected]


@pytest.mark.parametrize("long_already", services.PAIRINGS)
def test_a_story_with_one_way_left_runs_in_that(long_already: str) -> None:
    long = [pytest.mark.long.mark]
    ways = {way: Story(f"test_story[{way}]", long if way == long_already else []) for way in services.PAIRINGS}
    conftest._mark_further_ways(cast(list[Any], list(ways.values())))
    assert [way for way, story in ways.items() if not story.marks] == [*({*services.PAIRINGS} - {long_already})]


def test_a_way_that_a_story_does_not_have_is_an_error() -> None:
    ways = [Story(f"test_story[{way}]", [pytest.mark.on("MySQL").mark]) for way in services.PAIRINGS]
    with pytest.raises(ValueError, match="not in list"):
        conftest._mark_further_ways(cast(list[Any], ways))
