"""The command line has the same output whether the registry is in its own process or behind HTTP."""

import re
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from tests import services
from tests.scenarios.conftest import USER, serving, stock
from tests.scenarios.world import Cli, World, environment

PASSING = {"created_at", "moved_at", "at", "measured", "finished_at"}
"""Moments, which no two runs share."""


@pytest.fixture(params=services.PAIRINGS)
def both(request: pytest.FixtureRequest, tmp_path: Path, world: World) -> Generator[tuple[Cli, Cli]]:
    """Two registries of one pairing."""
    own = {"ADAPTORY_HOME": str(tmp_path / "embedded"), "ADAPTORY_USER": USER, **services.pairing(request.param)}
    with serving(services.pairing(request.param), tmp_path) as remote:
        yield stock(Cli(own), world), stock(remote, world)


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key not in PASSING}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def test_every_command_prints_the_same_documents_and_messages_both_ways(
    both: tuple[Cli, Cli], world: World, tmp_path: Path
) -> None:
    sql, other = world.adapters["sql"], world.adapters["other-sql"]
    lines: list[tuple[object, ...]] = [
        ("base", "show", "tiny"),
        ("push", sql, "acme/sql:1.0.0", "--base", "tiny", "--channel", "prod"),
        ("push", sql, "acme/sql:1.0.0", "--base", "tiny"),
        ("push", other, "acme/sql:1.0.0", "--base", "tiny"),
        ("push", other, "acme/sql", "--bump", "minor", "--base", "tiny"),
        ("push", other, "acme/other:1.0.0", "--base", "unknown"),
        ("search", "--base", "tiny", "--max-rank", "4", "--targets-within", "q_proj,v_proj"),
        ("search", "--targets-include", "o_proj"),
        ("gate", "acme/sql@prod", "--rule", "sql-exact.nll<=1"),
        ("promote", "acme/sql:1.1.0", "--to", "prod"),
        ("promote", "acme/sql:1.1.0", "--to", "prod", "--force", "--reason", "demo"),
        ("rollback", "acme/sql@prod", "--reason", "worse"),
        ("rollback", "acme/sql@prod"),
        ("history", "acme/sql@prod"),
        ("yank", "acme/sql:1.0.0", "--reason", "leaks"),
        ("show", "acme/sql:1.0.0"),
        ("show", "acme/sql:^1"),
        ("show", "acme/sql@prod"),
        ("log", "acme/sql"),
        ("list",),
        ("conflicts", "acme/sql:1.0.0", "acme/sql:1.1.0"),
        ("inspect", "acme/sql:1.0.0"),
        ("audit", "--subject", "acme/sql@prod"),
        ("show", "acme/nothing"),
    ]
    embedded, remote = both
    for words in lines:
        ours, theirs = embedded(*words, "--json"), remote(*words, "--json")
        assert (ours.code, without_registry(ours.err)) == (theirs.code, without_registry(theirs.err)), words
        assert timeless(ours.json) == timeless(theirs.json), words
        if words[0] not in ("push", "promote", "rollback", "yank"):
            ours, theirs = embedded(*words), remote(*words)
            assert without_moments(ours.out) == without_moments(theirs.out), words
    for name, cli in (("ours", embedded), ("theirs", remote)):
        cli.ok("pull", "acme/sql:1.1.0", "-o", tmp_path / name)
    pulled = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("ours", "theirs")]
    assert pulled[0] == pulled[1]


def without_registry(text: str) -> str:
    """A change names its registry, and these are two."""
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith("registry: "))


def without_moments(text: str) -> str:
    return re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", "MOMENT", text)


def test_the_registry_on_disk_opens_no_socket_to_anywhere(on_disk: Cli, world: World) -> None:
    """An audit hook of the interpreter sees every bind and connect; it cannot be removed, hence the own process."""
    watch = (
        "import socket, sys\n"
        "def hook(event, arguments):\n"
        "    if event in ('socket.bind', 'socket.connect', 'socket.getaddrinfo'):\n"
        "        raise RuntimeError(f'{event} {arguments}')\n"
        "sys.addaudithook(hook)\n"
        "from registry.cli.start import main\n"
        "main()\n"
    )
    push = ["push", str(world.adapters["sql"]), "acme/sql:1.0.0", "--base", "tiny", "--json"]
    cli = stock(on_disk, world)
    with environment(cli.environment, []):
        ran = subprocess.run([sys.executable, "-c", watch, *push], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert cli.json("show", "acme/sql")["version"] == "1.0.0"


def test_the_files_of_a_home_keep_their_names(stocked_on_disk: Cli, world: World) -> None:
    """Backup scripts and the next version of Adaptory rely on them."""
    stocked_on_disk.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny")
    assert {"registry.db", "store"} <= {
        path.name for path in Path(stocked_on_disk.environment["ADAPTORY_HOME"]).iterdir()
    }
