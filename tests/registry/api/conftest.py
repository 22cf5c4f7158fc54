"""The registry for tests of pages: embedded, with tokens, one for each module."""

from collections.abc import Generator

import pytest

from tests import services
from tests.access.house import House, new_house


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Generator[House]:
    house = new_house(services.PAIRINGS[0], tmp_path_factory.mktemp("house") / "home")
    yield house
    house.close()
