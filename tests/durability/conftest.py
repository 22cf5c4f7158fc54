"""Registries of both pairings whose processes the tests start and kill."""

import os
from collections.abc import Generator, Mapping
from pathlib import Path
from tempfile import mkdtemp

import pytest

from registry.environment.settings import Settings
from registry.transfer.fsck import check
from registry.transfer.resources import Resources, open_resources
from tests import services
from tests.durability.breakable import Postgres
from tests.durability.small import write_base
from tests.scenarios.world import Cli, environment


@pytest.fixture
def environ(pairing: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """The environment of a registry that knows one base."""
    variables = {"ADAPTORY_HOME": str(tmp_path / "home"), "ADAPTORY_USER": "mia", **pairing}
    Cli(variables).ok("base", "add", write_base(tmp_path / "base"), "--name", "tiny")
    return variables


@pytest.fixture(scope="module")
def own_postgres() -> Generator[Postgres]:
    """A cluster that no other module uses: it may be stopped and frozen. Separate from the shared one, since another
    run of pytest closes pytest's directories to PostgreSQL's user."""
    services.shared_postgres()  # skips or fails where there is none
    own = Postgres(Path(mkdtemp(dir=os.environ[services.DIRECTORY])))
    own.start()
    yield own
    own.stop()


def opened(environ: Mapping[str, str]) -> Resources:
    with environment(environ, ["adaptory"]):
        return open_resources(Settings())


def broken_promises(environ: Mapping[str, str], *, read_bytes: bool = False) -> list[str]:
    resources = opened(environ)
    try:
        findings = check(resources, read_bytes=read_bytes)
    finally:
        resources.close()
    return [finding.message for finding in findings if finding.severity == "error"]
