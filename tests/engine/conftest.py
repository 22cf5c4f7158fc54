"""A cluster for the tests of a module: a head and one more node, with one CPU each."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from registry.settings import Settings
from registry.worker.engine.ray import RayEngine
from registry.worker.engine.units import open_node
from tests.engine.cluster import RayCluster


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    started = RayCluster({"ADAPTORY_HOME": str(tmp_path_factory.mktemp("home"))})
    try:
        started.start()
        started.start()
        yield started
    finally:
        started.stop()


@pytest.fixture(scope="module")
def engine(cluster: RayCluster) -> Iterator[RayEngine]:
    """This process as a driver."""
    with pytest.MonkeyPatch.context() as patched:
        for name, value in {**cluster.environ, **cluster.driver_environ}.items():
            patched.setenv(name, value)
        settings = Settings()
        opened = RayEngine(settings.engine, open_node(settings))
        yield opened
        opened.close()


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "journal"
