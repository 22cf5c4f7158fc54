"""`make test` runs every story, in one of the ways that it can run in."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

from tests import conftest, services


@dataclass
class Story:
    """What marks are given by: a part of `pytest.Item`."""

    nodeid: str
    marks: list[str] = field(default_factory=list[str])
    path = Path("test_stories.py")

    def get_closest_marker(self, name: str) -> str | None:
        return name if name in self.marks else None

    def add_marker(self, mark: pytest.MarkDecorator) -> None:
        self.marks.append(mark.name)


@pytest.mark.parametrize("long_already", [set[str](), *({way} for way in services.PAIRINGS)])
def test_a_story_runs_by_default_in_one_way_whatever_its_name(long_already: set[str]) -> None:
    chosen = list[str]()
    for number in range(30):
        ways = {way: Story(f"test_{number}[{way}]", ["long"] * (way in long_already)) for way in services.PAIRINGS}
        conftest._mark_further_ways(cast(list[Any], list(ways.values())))
        (default,) = [way for way, story in ways.items() if not story.marks]
        chosen.append(default)
    assert set(chosen) == set(services.PAIRINGS) - long_already
