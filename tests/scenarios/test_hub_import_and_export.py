"""Releases that come from a Hugging Face Hub and go to one. The hub is another Adaptory: a real server of the same
protocol, read and written by the hub's own client."""

import json
import os
import shutil
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard, parse_eval_result_entries

from tests import services
from tests.forked import start_command
from tests.scenarios.conftest import USER, Templates
from tests.scenarios.hub_client import CONFIG, WEIGHTS
from tests.scenarios.traces import hashes
from tests.scenarios.world import Cli, Ran, World, server

CARD, BASE_ID = "README.md", "Acme/Tiny-Llama"


@dataclass
class Online(Cli):
    """`adaptory …` in a process of its own, since the hub's client reads its environment when it is imported."""

    directory: Path = field(default_factory=Path)

    def __call__(self, *arguments: object) -> Ran:
        apart = ("ADAPTORY_", "HF_")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(apart)}
        environment |= {"HF_HOME": str(self.directory / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1", **self.environment}
        out, err = self.directory / "out", self.directory / "err"
        process = start_command([str(one) for one in arguments], environment, out, err)
        process.join(60)
        assert process.exitcode is not None
        return Ran(process.exitcode, out.read_text(), err.read_text())

    def having(self, **environment: str) -> "Online":
        return Online({**self.environment, **environment}, self.served_with, self.directory)


def online(cli: Cli, directory: Path) -> Online:
    directory.mkdir()
    return Online(cli.environment, cli.served_with, directory)


@dataclass(frozen=True)
class Far:
    """Another team's hub, whose own people use it with `cli`."""

    url: str
    cli: Cli

    @property
    def endpoint(self) -> tuple[str, str]:
        return "--endpoint", self.url


@pytest.fixture(scope="module")
def far(templates: Templates, tmp_path_factory: pytest.TempPathFactory) -> Generator[Far]:
    home = tmp_path_factory.mktemp("far") / "server"
    environment = {**templates.copy(services.PAIRINGS[0], home), "ADAPTORY_USER": USER}
    with server(home, **environment) as (url, _):
        yield Far(url, Cli({"ADAPTORY_HOME": str(home.with_name("client")), "ADAPTORY_URL": url}))


def carded(world: World, directory: Path, card: dict[str, Any], body: str = "# A card\n") -> Path:
    """The adapter sql with a model card."""
    shutil.copytree(world.adapters["sql"], directory)
    (directory / CARD).write_text(f"---\n{yaml.safe_dump(card)}---\n{body}")
    return directory


def test_first(stocked: Cli, far: Far, world: World, tmp_path: Path) -> None:
    pushed = carded(world, tmp_path / "out", {"base_model": "Acme/Tiny-Llama", "license": "mit"})
    far.cli.ok("push", pushed, "far/sql:1.0.0", "--base", "tiny")
    me = online(stocked, tmp_path / "me")
    print(me.ok("import", "hf://far/sql", "acme/sql:1.0.0", *far.endpoint))
    print(stocked.ok("show", "acme/sql:1.0.0"))
    print(me.ok("export", "acme/sql:1.0.0", "hf://far/back", *far.endpoint))
    print(me.ok("export", "acme/sql:1.0.0", "hf://far/back", *far.endpoint))
    print(me.ok("base", "add", "hf://far/back", "--name", "x"))
    assert 0
