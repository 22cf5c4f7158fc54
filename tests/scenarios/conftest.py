"""The same stories over the embedded registry and over a real server, on both pairings of database and store."""

from collections.abc import Generator
from pathlib import Path

import pytest

from tests import services
from tests.scenarios.world import Cli, World, build_world, server

USER = "mia"


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def embedded(tmp_path: Path) -> Cli:
    return Cli({"ADAPTORY_HOME": str(tmp_path / "home"), "ADAPTORY_USER": USER})


@pytest.fixture(params=("SQLite and a directory", "PostgreSQL and S3"))
def either(request: pytest.FixtureRequest, tmp_path: Path) -> Cli:
    """The whole registry within the command line's own process, on either pairing."""
    environment = {"ADAPTORY_HOME": str(tmp_path / "home"), "ADAPTORY_USER": USER}
    if request.param == "PostgreSQL and S3":
        environment |= request.getfixturevalue("s3_environment")
        environment["ADAPTORY_DATABASE_URL"] = request.getfixturevalue("fresh_postgres")
    return Cli(environment)


@pytest.fixture
def fresh_postgres() -> str:
    """An empty, migrated database of its own."""
    return services.new_database(migrated=True)


WAYS = ("embedded", "server", "server on PostgreSQL and S3")


@pytest.fixture(params=WAYS)
def cli(request: pytest.FixtureRequest, tmp_path: Path) -> Generator[Cli]:
    """The command line against each way of running a registry."""
    if request.param == "embedded":
        yield request.getfixturevalue("embedded")
        return
    environment = {"ADAPTORY_USER": USER}
    if request.param == "server on PostgreSQL and S3":
        environment |= request.getfixturevalue("s3_environment")
        environment["ADAPTORY_DATABASE_URL"] = request.getfixturevalue("fresh_postgres")
    with server(tmp_path / "server", **environment) as (url, _):
        yield Cli({"ADAPTORY_HOME": str(tmp_path / "home"), "ADAPTORY_URL": url}, served_with=environment)


@pytest.fixture
def stocked(cli: Cli, world: World) -> Cli:
    """A registry that knows the base and the suites."""
    return stock(cli, world)


@pytest.fixture
def stocked_embedded(embedded: Cli, world: World) -> Cli:
    return stock(embedded, world)


@pytest.fixture
def team(stocked_embedded: Cli, world: World) -> Cli:
    """A registry with two adapters, unless a module has a larger team."""
    for name in ("sql", "terraform"):
        stocked_embedded.ok("push", world.adapters[name], f"acme/{name}:1.0.0", "--base", "tiny")
    return stocked_embedded


def stock(cli: Cli, world: World) -> Cli:
    cli.ok("base", "add", world.base, "--name", "tiny", "--alias", "Acme/Tiny-Llama")
    for suite in world.suites.values():
        cli.ok("suite", "add", suite)
    return cli
