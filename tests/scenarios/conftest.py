"""The same stories over the embedded registry and over a real server, on both pairings of database and store."""

import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import services
from tests.scenarios.traces import traces
from tests.scenarios.world import SMALL_PARTS, Cli, World, build_world, server

USER = "mia"


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def on_disk(tmp_path: Path) -> Cli:
    """SQLite and a directory within the command line's own process, for tests of things that only they can do, or
    cannot: a full disk, no sockets, half a file in a directory; and for commands that read no registry."""
    return Cli({"ADAPTORY_HOME": str(tmp_path / "home"), "ADAPTORY_USER": USER})


@pytest.fixture
def embedded(pairing: dict[str, str], tmp_path: Path) -> Cli:
    """The whole registry within the command line's own process, on either pairing."""
    return Cli({"ADAPTORY_HOME": str(tmp_path / "home"), "ADAPTORY_USER": USER, **pairing})


WAYS = ("embedded", *services.PAIRINGS)


@pytest.fixture(params=WAYS)
def cli(request: pytest.FixtureRequest, tmp_path: Path) -> Generator[Cli]:
    """The command line against each way of running a registry: in its own process, or behind a server of a pairing."""
    if request.param == "embedded":
        yield request.getfixturevalue("on_disk")
        return
    with serving(services.pairing(request.param), tmp_path) as cli:
        yield cli


Push = tuple[str, ...]
"""An adapter of the world, and the other words of a push."""
OWN = ("ADAPTORY_HOME", "ADAPTORY_USER")


class Templates:
    """Registries that know the base and the suites, of each pairing; built once, since copying is much faster. The
    stores of those without releases are empty."""

    def __init__(self, world: World, directory: Path) -> None:
        self._world, self._directory = world, directory
        self._built: dict[tuple[str, tuple[Push, ...]], Cli] = {}

    def copy(self, name: str, home: Path, *pushes: Push) -> dict[str, str]:
        """A copy of a pairing, with this home, after these pushes."""
        if (name, pushes) not in self._built:
            self._built[name, pushes] = self._build(name, self._directory / str(len(self._built)), pushes)
        built = self._built[name, pushes]
        shutil.copytree(built.environment["ADAPTORY_HOME"], home)
        pairing = {key: text for key, text in built.environment.items() if key not in OWN}
        return services.copied_pairing(pairing, blobs=bool(pushes))

    def embedded(self, name: str, directory: Path, *pushes: Push) -> Cli:
        """The command line with a copy within its own process, whose home is below the directory."""
        home = directory / "home"
        return Cli({"ADAPTORY_HOME": str(home), "ADAPTORY_USER": USER, **self.copy(name, home, *pushes)})

    def _build(self, name: str, home: Path, pushes: tuple[Push, ...]) -> Cli:
        own = dict(zip(OWN, (str(home), USER), strict=True))
        cli = stock(Cli({**own, **services.pairing(name, kept=True)}), self._world)
        assert traces(cli).blobs == frozenset()
        for adapter, *words in pushes:
            cli.ok("push", self._world.adapters[adapter], *words)
        return cli


@pytest.fixture(scope="session")
def templates(world: World, tmp_path_factory: pytest.TempPathFactory) -> Templates:
    return Templates(world, tmp_path_factory.mktemp("templates"))


@pytest.fixture(params=WAYS)
def stocked(request: pytest.FixtureRequest, templates: Templates, tmp_path: Path) -> Generator[Cli]:
    """A registry that knows the base and the suites, in each way of running it; large files are sent to S3 in small
    parts."""
    if request.param == "embedded":
        templates.copy(services.PAIRINGS[0], tmp_path / "home")
        yield request.getfixturevalue("on_disk")
        return
    pairing = templates.copy(request.param, tmp_path / "server")
    with serving(pairing and pairing | SMALL_PARTS, tmp_path) as cli:
        yield cli


@pytest.fixture
def stocked_on_disk(templates: Templates, tmp_path: Path, on_disk: Cli) -> Cli:
    """A registry that knows the base and the suites, for tests that do not depend on its database and store."""
    templates.copy(services.PAIRINGS[0], tmp_path / "home")
    return on_disk


@pytest.fixture(params=services.PAIRINGS)
def stocked_embedded(request: pytest.FixtureRequest, templates: Templates, tmp_path: Path) -> Cli:
    """The same within the command line's own process, on either pairing."""
    return templates.embedded(request.param, tmp_path)


@pytest.fixture(params=services.PAIRINGS)
def team(request: pytest.FixtureRequest, templates: Templates, tmp_path: Path) -> Cli:
    """A registry with two adapters, unless a module has a larger team."""
    return templates.embedded(request.param, tmp_path, *first_releases("sql", "terraform"))


@pytest.fixture(params=services.PAIRINGS)
def small_team(request: pytest.FixtureRequest, templates: Templates, tmp_path: Path) -> Cli:
    """A registry with three adapters, which prod serves."""
    return templates.embedded(
        request.param, tmp_path, *first_releases("sql", "terraform", "support", options=("--channel", "prod"))
    )


@pytest.fixture(params=services.PAIRINGS)
def sql_and_support(request: pytest.FixtureRequest, templates: Templates, tmp_path: Path) -> Cli:
    """A registry with these two adapters."""
    return templates.embedded(request.param, tmp_path, *first_releases("sql", "support"))


def first_releases(*adapters: str, options: tuple[str, ...] = ()) -> list[Push]:
    return [(name, f"acme/{name}:1.0.0", "--base", "tiny", *options) for name in adapters]


@contextmanager
def serving(pairing: Mapping[str, str], directory: Path) -> Generator[Cli]:
    """The command line against a server of this database and this store."""
    environment = {"ADAPTORY_USER": USER, **pairing}
    with server(directory / "server", **environment) as (url, _):
        yield Cli({"ADAPTORY_HOME": str(directory / "home"), "ADAPTORY_URL": url}, served_with=environment)


def stock(cli: Cli, world: World) -> Cli:
    cli.ok("base", "add", world.base, "--name", "tiny", "--alias", "Acme/Tiny-Llama")
    for suite in world.suites.values():
        cli.ok("suite", "add", suite)
    return cli
