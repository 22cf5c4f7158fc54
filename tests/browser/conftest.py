"""A server with a small real registry that has one of everything that pages show, and a browser."""

import json
import os
import shutil
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright

from registry.domain.access.audit import Actor
from registry.domain.access.roles import EVERYWHERE, Role
from registry.domain.catalog import releases, suites
from registry.domain.catalog.releases import NewRelease
from registry.domain.catalog.repositories import Kind
from registry.domain.catalog.suites import Measurement
from registry.formats.manifest import ManifestFile
from registry.formats.references import Digest, RepositoryName, Version
from tests import services
from tests.access.house import FACTS
from tests.eventually import eventually
from tests.s3_server import locked
from tests.scenarios.test_crashes import resources_of
from tests.scenarios.world import Cli, World, build_world, server

CHECKED = ("acme/sql:1.0.0", "acme/terraform:1.0.0", "acme/support:1.0.0")
"""Adapters whose conflict check is computed."""
CHROMIUM = Path("/usr/bin/chromium")
expect.set_options(timeout=20_000)  # four test processes share two cores
CARD = """# SQL

Schema changes in words, answered by one statement.

| step | loss on the examples that were held out | loss on those of the guard, which nobody has trained on |
|---|---|---|
| 50 | exact match 0.94, nll 0.2, of 32 | exact match 0.17, nll 0.8, of 24 |
"""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Pictures are taken only on request."""
    unwanted = collection_path.name == "test_screenshots.py" and not config.getoption("--screenshots")
    return True if unwanted else None


@dataclass(frozen=True)
class Site:
    """A running registry: its address, and the ids of a composition that published, one that was refused, and an
    evaluation."""

    url: str
    cli: Cli
    composition: int
    job: int


@dataclass(frozen=True)
class Furnished:
    """A registry that is not served yet: the directory of its home, and the ids of `Site`."""

    world: World
    home: Path
    composition: int
    job: int


@pytest.fixture(scope="session")
def furnished() -> Furnished:
    """Built once, by the first test process that needs it: it takes ten seconds of two cores."""
    directory = Path(os.environ[services.DIRECTORY]) / "site"
    directory.mkdir(exist_ok=True)
    kept = directory / "furnished.json"
    with locked(directory / "lock"):
        if not kept.exists():
            kept.write_text(json.dumps(_furnish(directory)))
    made = json.loads(kept.read_text())
    named = {kind: {name: Path(path) for name, path in made[kind].items()} for kind in ("adapters", "suites")}
    world = World(Path(made["base"]), named["adapters"], named["suites"])
    return Furnished(world, directory / "home", made["composition"], made["job"])


def _furnish(directory: Path) -> dict[str, Any]:
    (directory / "world").mkdir()
    world, home = build_world(directory / "world"), directory / "home"
    cli = Cli({"ADAPTORY_HOME": str(home), "ADAPTORY_USER": "mia"})
    composition = _fill(cli, world, directory)
    _publish_many(cli)
    job = cli.json("eval", "acme/support:1.0.0", "--suite", "guard-exact", "--queue", "--no-wait")["job"]
    with server(home, ADAPTORY_USER="mia") as (url, _):
        compare(url, *CHECKED)
    paths = {kind: {name: str(path) for name, path in getattr(world, kind).items()} for kind in ("adapters", "suites")}
    return {"base": str(world.base), **paths, "composition": composition, "job": job}


@pytest.fixture(scope="session")
def world(furnished: Furnished) -> World:
    return furnished.world


@pytest.fixture(scope="session")
def site(furnished: Furnished, tmp_path_factory: pytest.TempPathFactory) -> Generator[Site]:
    home = shutil.copytree(furnished.home, tmp_path_factory.mktemp("site") / "home")
    cli = Cli({"ADAPTORY_HOME": str(home), "ADAPTORY_USER": "mia"})
    with server(home, ADAPTORY_USER="mia") as (url, _):
        yield Site(url, cli, furnished.composition, furnished.job)


def _publish_many(cli: Cli) -> None:
    """A repository of 32 measured versions, written straight into the tables: a push of each would take ten seconds."""
    with resources_of(cli.environment) as resources, resources.write() as session:
        actor = Actor("mia", resources.clock(), {EVERYWHERE: Role.ADMIN})
        old = releases.find(session, RepositoryName("acme", "sql"), Version(1, 0, 0))
        files = releases.files_of(session, old)[old.revision_id]
        suite = suites.find(session, "guard-exact")
        for minor in range(32):
            renamed = [ManifestFile(f"{minor}-{file.path}", file.size_bytes, Digest(file.sha256)) for file in files]
            name, version = RepositoryName("acme", "long"), Version(1, minor, 0)
            new = NewRelease(name, Kind.ADAPTER, version, None, renamed, old.base_digest, FACTS)
            release, _ = releases.publish(session, actor, new)
            measured = Measurement(suite.digest, "nll", 5 - minor / 10, 0.2, 6, higher_is_better=False)
            suites.record(session, actor, release, [measured])


def compare(url: str, *adapters: str) -> None:
    """Requests the conflict check of some adapters, and waits until the server's worker has computed it."""
    wanted = {"inputs": [{"adapter": adapter} for adapter in adapters]}
    eventually(lambda: httpx2.post(f"{url}/v1/conflicts", json=wanted).json()["state"] == "done")


def _fill(cli: Cli, world: World, directory: Path) -> int:
    """Three versions that prod has served, one of them forced and yanked, one that waits, and a composition."""
    (world.adapters["sql"] / "README.md").write_text(CARD)
    cli.ok("base", "add", world.base, "--name", "tiny", "--alias", "Acme/Tiny-Llama")
    for suite in world.suites.values():
        cli.ok("suite", "add", suite)
    for adapter, version in (("sql", "1.0.0"), ("other-sql", "1.1.0")):
        cli.ok("push", world.adapters[adapter], f"acme/sql:{version}", "--base", "tiny", "--notes", "trained again")
    for name in ("terraform", "support"):
        cli.ok("push", world.adapters[name], f"acme/{name}:1.0.0", "--base", "tiny", "--channel", "prod")
    cli.ok("eval", "tiny", "acme/sql:1.0.0", "acme/sql:1.1.0", "--suite", "sql-exact", "--suite", "guard-exact")
    rules = ["sql-exact.nll within 1000 of served", "guard-exact.accuracy >= 0.99"]
    cli.ok("gate", "acme/sql@prod", "--rule", rules[0])
    cli.ok("promote", "acme/sql:1.0.0", "--to", "prod", "--reason", "the first one", "--force")
    cli.ok("promote", "acme/sql:1.1.0", "--to", "prod", "--reason", "trained longer")
    cli.ok("rollback", "acme/sql@prod", "--reason", "it answers the wrong question")
    cli.ok("gate", "acme/sql@prod", "--rule", rules[0], "--rule", rules[1])
    cli.ok("promote", "acme/sql:1.1.0", "--to", "prod", "--reason", "the release party is at noon", "--force")
    _wait(cli, directory)
    cli.ok("push", _copy(world.adapters["sql"], directory), "acme/sql:1.2.0", "--base", "tiny")
    cli.ok("yank", "acme/sql:1.2.0", "--reason", "trained on the test set")
    return _compose(cli, directory)


def _copy(adapter: Path, directory: Path) -> Path:
    """The same adapter with another card: other content."""
    copy = shutil.copytree(adapter, directory / "copy")
    (copy / "README.md").write_text("# Another card\n")
    return copy


def _wait(cli: Cli, directory: Path) -> None:
    """A promotion that waits for an approval."""
    policy = directory / "policy.yaml"
    asked: dict[str, Any] = {
        "version": 1,
        "rules": ["sql-exact.nll within 1000 of base"],
        "min_n": 2,
        "approval": {"role": "releaser", "count": 1},
        "licenses": {"refuse": ["CC-BY-NC-4.0"]},
        "loads_in": ["peft"],
        "force": "admin",
    }
    cli.ok("promote", "acme/sql:1.0.0", "--to", "staging", "--new-channel", "--reason", "for the demo")
    policy.write_text(yaml.safe_dump(asked))
    cli.ok("policy", "set", "acme/sql@staging", policy)
    cli("promote", "acme/sql:1.1.0", "--to", "staging", "--reason", "for everyone", "--no-wait")


def _compose(cli: Cli, directory: Path) -> int:
    recipe = {
        "base": "tiny",
        "inputs": [
            {"adapter": "acme/sql:1.0.0", "weight": 0.5, "suite": "sql-exact"},
            {"adapter": "acme/terraform:1.0.0", "weight": 0.5, "suite": "terraform-exact"},
        ],
        "method": "linear",
        "adapter": "acme/assistant:1.0.0",
        "evaluate": ["sql-exact", "guard-exact"],
        "gates": ["sql-exact.nll within 1000 of base", "guard-exact.nll within 1000 of inputs"],
        "probe": 1,
    }
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | {"gates": ["sql-exact.accuracy >= 0.99"]}))
    assert cli("compose", path).code == 1
    path.write_text(yaml.safe_dump(recipe))
    return int(cli.json("compose", path)["id"])


@pytest.fixture(scope="session")
def browser() -> Generator[Browser]:
    if not CHROMIUM.exists():
        services.unavailable("chromium", f"{CHROMIUM} is missing; install Debian's package chromium")
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


def grave_findings(tab: Page) -> list[str]:
    """The serious and critical findings of axe on the page in the tab."""
    violations = Axe().run(tab).response["violations"]
    grave = [violation for violation in violations if violation["impact"] in ("serious", "critical")]
    return [f"{violation['id']}: {node['html'][:200]}" for violation in grave for node in violation["nodes"]]


@pytest.fixture(scope="module")
def tab(browser: Browser) -> Generator[Page]:
    """One tab for the module: a new one for each page would take half of the time."""
    context = browser.new_context(reduced_motion="reduce")
    yield context.new_page()
    context.close()


@pytest.fixture
def complaints(tab: Page) -> Generator[list[str]]:
    """Messages on the browser's console, including violations of the content security policy."""
    said: list[str] = []

    def listen(message: object) -> None:
        said.append(f"{getattr(message, 'type', 'error')}: {getattr(message, 'text', message)}")

    tab.on("console", listen)
    tab.on("pageerror", listen)
    yield said
    tab.remove_listener("console", listen)
    tab.remove_listener("pageerror", listen)
