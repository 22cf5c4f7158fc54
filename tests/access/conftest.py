"""Registries for requests of every caller. A module that needs another one has its own fixtures of these names."""

from collections.abc import Generator
from pathlib import Path

import pytest

from tests import services
from tests.access.house import House, copy_of, entered, furnished_house


@pytest.fixture(scope="module", params=services.ONE_PAIRING)
def furnished(request: pytest.FixtureRequest) -> House:
    return furnished_house(request.param)


@pytest.fixture
def house(furnished: House, tmp_path: Path) -> Generator[House]:
    """A separate house for each test: some of them change things."""
    copy = entered(furnished, copy_of(furnished, tmp_path / "home"))
    yield copy
    copy.close()


@pytest.fixture(scope="module")
def unchanged(furnished: House, tmp_path_factory: pytest.TempPathFactory) -> Generator[House]:
    """One house for all requests that change nothing: a separate one takes longer than they do."""
    copy = entered(furnished, copy_of(furnished, tmp_path_factory.mktemp("unchanged") / "home"), rate_limit="")
    yield copy
    copy.close()
