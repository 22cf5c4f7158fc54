"""A registry with two adapters, and a cluster of two nodes with one CPU each, for the tests of a module."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from registry.environment.settings import Settings
from registry.worker.engine.ray import RayEngine, base_resource
from registry.worker.engine.units import open_node
from tests import services
from tests.engine.cluster import RayCluster
from tests.engine.site import Site
from tests.scenarios.conftest import USER, Templates, templates, world
from tests.scenarios.test_compositions import release_all
from tests.scenarios.world import Cli, World

__all__ = ["templates", "world"]  # fixtures


@pytest.fixture(scope="module")
def site(templates: Templates, world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("site")
    pairing = templates.copy(services.PAIRINGS[1], directory / "home")
    environ = {"ADAPTORY_HOME": str(directory / "home"), "ADAPTORY_USER": USER, **pairing}
    cli = release_all(Cli(environ), world)
    digest = cli.json("base", "show", "tiny")["digest"]
    cluster = RayCluster(environ, resources=json.dumps({base_resource(digest): 1}))
    try:
        for _ in range(2):
            cluster.start()
        yield Site(cli, cluster, directory / "worker")
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def cluster(site: Site) -> RayCluster:
    return site.cluster


@pytest.fixture(scope="module")
def driver(cluster: RayCluster) -> Iterator[RayEngine]:
    """This process as a driver."""
    with pytest.MonkeyPatch.context() as patched:
        for name, value in {**cluster.environ, **cluster.driver_environ}.items():
            patched.setenv(name, value)
        settings = Settings()
        opened = RayEngine(settings.engine, open_node(settings))
        yield opened
        opened.close()


@pytest.fixture
def engine(driver: RayEngine) -> Iterator[RayEngine]:
    """The driver, which leaves the cluster's CPUs to the next test."""
    yield driver
    driver.release()


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "journal"
