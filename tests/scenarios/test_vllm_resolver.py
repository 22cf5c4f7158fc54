"""A vLLM server finds adapters with its own resolver, unmodified, in an environment made by the Makefile."""

import json
import os
import subprocess
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests import services
from tests.scenarios.conftest import USER, Templates
from tests.scenarios.hub_client import CONFIG, WEIGHTS
from tests.scenarios.traces import hashes
from tests.scenarios.world import Cli, World, server

pytestmark = pytest.mark.long
VERSION = "0.32.0"
Ask = Callable[[str, str], Any]


@contextmanager
def resolver(environment: dict[str, str], *listed: str) -> Generator[Ask]:
    """A process with the resolver for those repositories: for a base and a name, the adapter that it would load."""
    python = Path(__file__).parents[2] / f".venv-vllm-{VERSION}" / "bin" / "python"
    if not (python.parents[1] / ".ready").exists():
        services.unavailable(f"vLLM {VERSION}", f"make .venv-vllm-{VERSION}/.ready")
    program = [python, Path(__file__).with_name("vllm_resolver.py"), ",".join(listed)]
    values = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "ADAPTORY_", "VLLM_"))}
    values |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", **environment}
    with subprocess.Popen(program, env=values, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def ask(base: str, name: str) -> Any:
            print(json.dumps([base, name]), file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        yield ask
        process.stdin.close()


@pytest.mark.parametrize("pairing", services.PAIRINGS)
def test_the_resolver_of_vllm_follows_a_channel_each_time_that_it_is_asked(
    templates: Templates, world: World, tmp_path: Path, pairing: str
) -> None:
    """vLLM calls it for a name that is not loaded: for the first time, and after it was unloaded."""
    home = tmp_path / "server"
    environment = templates.copy(pairing, home) | {"ADAPTORY_ACCESS": "tokens", "ADAPTORY_USER": USER}
    cli = Cli({"ADAPTORY_HOME": str(home), **environment})
    cli.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny", "--channel", "prod")
    cli.ok("push", world.adapters["other-sql"], "acme/sql:1.1.0", "--base", "tiny")
    cli.ok("namespace", "grant", "acme", "vllm", "reader")
    token = cli.ok("token", "create", "--user", "vllm").out.strip()
    base = json.loads((world.adapters["sql"] / CONFIG).read_text())["base_model_name_or_path"]
    with ExitStack() as registry:
        url, _ = registry.enter_context(server(home, **environment))
        reader = {"HF_ENDPOINT": url, "HF_TOKEN": token, "HF_HOME": str(tmp_path / "cache")}
        with resolver(reader, "acme/sql.prod", "acme/sql.v1.1.0") as ask:
            name, first, version = ask(base, "acme/sql.prod")
            assert (name, version) == ("acme/sql.prod", VERSION)
            assert _weights(first) == hashes(world.adapters["sql"])[WEIGHTS]
            cli.ok("promote", "acme/sql:1.1.0", "--to", "prod")
            _, second, _ = ask(base, "acme/sql.prod")
            assert second != first, "the path names the commit, so that nothing cached for the old one is taken"
            assert _weights(second) == hashes(world.adapters["other-sql"])[WEIGHTS]
            assert _weights(first) == hashes(world.adapters["sql"])[WEIGHTS], "a server may read it again"
            assert _weights(ask(base, "acme/sql.v1.1.0")[1]) == _weights(second)
            cli.ok("rollback", "acme/sql@prod")
            assert ask(base, "acme/sql.prod")[1] == first
            assert ask("another/base", "acme/sql.prod") is None, "it compares the name of the base"
            assert ask(base, "acme/sql") is None, "it is not in its list"
            registry.close()
            assert ask(base, "acme/sql.prod")[1] == first, "without the registry it takes what it had last"


def _weights(directory: str) -> str:
    return hashes(Path(directory))[WEIGHTS]
