"""A registry with two releases of acme/sql, behind a server, and agents that follow it."""

import shutil
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import httpx2
import pytest

from composer.export.gguf import convert_to_gguf
from composer.formats.gguf import open_gguf_base
from registry.agent.directory import MirrorDirectory
from registry.agent.servers.llamacpp import LlamaServer
from registry.agent.versions import ServedVersion
from registry.formats.evidence import USUAL, Tolerance
from tests import services
from tests.eventually import eventually
from tests.forked import start_command
from tests.scenarios.conftest import USER, Templates, templates, world
from tests.scenarios.world import Cli, World, own_environment, server
from tests.serving.double import weights_hash
from tests.serving.llama_base import write_llama

__all__ = ["templates", "world"]


@dataclass
class Site:
    """A registry that a server answers for, until `stop`; `home` is its own."""

    cli: Cli
    url: str
    home: Path
    directory: Path
    hashes: Mapping[str, str]
    _stack: ExitStack = field(default_factory=ExitStack)

    def start(self) -> None:
        """Starts the server on its port again."""
        with pytest.MonkeyPatch.context() as patch:
            port = int(self.url.rpartition(":")[2])
            patch.setattr(services, "free_port", lambda: port)
            self._stack.enter_context(server(self.home))

    def stop(self) -> None:
        self._stack.close()

    def promote(self, version: str, repository: str = "acme/sql") -> None:
        self.cli.ok("promote", f"{repository}:{version}", "--to", "prod")


@pytest.fixture(scope="session")
def llama(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world's base as a GGUF file."""
    return write_llama(world.base, tmp_path_factory.mktemp("llama") / "base.gguf")


def converted(directory: MirrorDirectory, version: ServedVersion, base: Path) -> None:
    """Converts a version as the agent would, without the seconds of a process."""
    out = directory.root / "gguf" / version.name / version.commit
    out.parent.mkdir(parents=True)
    convert_to_gguf(directory.path(version.commit), out, open_gguf_base(base))


@contextmanager
def llama_processes(text: str, directory: MirrorDirectory, limits: Tolerance = USUAL) -> Generator[LlamaServer]:
    """A kept llama.cpp with that command. All its processes end with the block, also those that another agent of the
    directory started."""
    opened = LlamaServer(text, directory, limits)
    try:
        yield opened
    finally:
        ending = LlamaServer(text, directory)
        for name in ending.loaded():
            ending.unload(name)
        ending.close()


@pytest.fixture(scope="session")
def stocked_home(templates: Templates, world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of a registry with the releases, which each test copies."""
    home = tmp_path_factory.mktemp("serving") / "registry"
    templates.copy(services.PAIRINGS[0], home)
    embedded = Cli({"ADAPTORY_HOME": str(home), "ADAPTORY_USER": USER})
    for name, version in (("sql", "sql:1.0.0"), ("other-sql", "sql:1.1.0"), ("terraform", "terraform:1.0.0")):
        embedded.ok("push", world.adapters[name], f"acme/{version}", "--base", "tiny")
    for repository in ("sql", "terraform"):
        embedded.ok("promote", f"acme/{repository}:1.0.0", "--to", "prod")
    return home


@pytest.fixture
def site(stocked_home: Path, world: World, tmp_path: Path) -> Generator[Site]:
    """acme/sql@prod serves 1.0.0; 1.1.0 has other weights. acme/terraform@prod serves 1.0.0."""
    home = tmp_path / "registry"
    shutil.copytree(stocked_home, home)
    hashes = {
        "acme/sql@1.0.0": weights_hash(world.adapters["sql"]),
        "acme/sql@1.1.0": weights_hash(world.adapters["other-sql"]),
        "acme/terraform@1.0.0": weights_hash(world.adapters["terraform"]),
    }
    url = f"http://127.0.0.1:{services.free_port()}"
    client = Cli({"ADAPTORY_HOME": str(tmp_path / "client"), "ADAPTORY_URL": url})
    running = Site(client, url, home, tmp_path, hashes)
    running.start()
    yield running
    running.stop()


@dataclass
class Agent:
    """A running `adaptory mirror`, with its directory and the address of its health."""

    site: Site
    directory: Path
    words: tuple[object, ...]
    listen: int = field(default_factory=services.free_port)
    process: BaseProcess | None = None

    def start(self) -> None:
        words = ["mirror", *self.words, "--listen", f"127.0.0.1:{self.listen}"]
        log = self.directory.with_name(f"{self.directory.name}.log")
        self.process = start_command(words, own_environment(self.site.cli), log)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join(20)

    @property
    def health(self) -> dict[str, Any]:
        return httpx2.get(f"http://127.0.0.1:{self.listen}/healthz").json()

    def routed(self, channel: str = "acme/sql@prod") -> str | None:
        """The version that the channel is routed to."""
        version = MirrorDirectory(self.directory).routes().version(channel)
        return version.name if version else None

    def wait_for(self, name: str | None, channel: str = "acme/sql@prod", within_s: float = 30) -> None:
        try:
            eventually(lambda: self.routed(channel) == name, within_s=within_s)
        except AssertionError as error:
            log = self.directory.with_name(f"{self.directory.name}.log").read_text()
            raise AssertionError(f"{channel} is routed to {self.routed(channel)}: {self.problems()}\n{log}") from error

    def wait_for_problem(self, words: str, within_s: float = 30) -> None:
        """Waits until the health shows a problem with these words."""
        eventually(lambda: any(words in problem for problem in self.problems()), within_s=within_s)

    def problems(self) -> list[str]:
        try:
            return self.health["problems"]
        except httpx2.TransportError:
            return []


@contextmanager
def mirrored(
    site: Site, *words: object, channels: tuple[str, ...] = ("acme/sql@prod",), directory: str = "served"
) -> Generator[Agent]:
    """A running agent of these channels."""
    kept_in = site.directory / directory
    agent = Agent(site, kept_in, (*channels, kept_in, *words))
    agent.start()
    try:
        yield agent
    finally:
        agent.kill()


def loaded(url: str) -> dict[str, str]:
    """The names that a server has loaded, with their paths; none while it does not answer."""
    try:
        rows = httpx2.get(f"{url}/v1/models").json().get("data", [])
    except httpx2.TransportError:
        return {}
    return {row["id"]: row["root"] for row in rows if row["parent"]}
