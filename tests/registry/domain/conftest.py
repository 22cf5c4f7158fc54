"""A registry whose channel serves a release with a score, at a fixed time."""

from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import pytest

from tests import services
from tests.access.house import NOW, House, copy_of, entered, furnished_house


@pytest.fixture(scope="module", params=services.PAIRINGS)
def furnished(request: pytest.FixtureRequest) -> House:
    return furnished_house(request.param)


@pytest.fixture
def house(furnished: House, tmp_path: Path) -> Generator[House]:
    """`prod` serves 1.1.0 above 1.0.0; both have a score `exact.nll` of 0.5 on one example."""
    copy = entered(furnished, copy_of(furnished, tmp_path / "home"))
    copy.resources = replace(copy.resources, clock=lambda: NOW)
    yield copy
    copy.close()
