"""The contents of the Docker image, as separate processes behind TLS, play the story of the demo."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from tests import services
from tests.deploy import dockerfile
from tests.deploy.stack import DEPLOY, Stack
from tests.scenarios.world import World, build_world

pytestmark = pytest.mark.long


@dataclass(frozen=True)
class Installed:
    """An `adaptory` that the Dockerfile's commands installed."""

    prefix: Path
    environment: Mapping[str, str]

    def __call__(self, *words: object, expect: int = 0) -> str:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("ADAPTORY_", "PYTHON"))}
        command = [str(self.prefix / "bin" / "adaptory"), *map(str, words)]
        ran = subprocess.run(command, env={**kept, **self.environment}, capture_output=True, text=True, timeout=300)
        assert ran.returncode == expect, f"{words} -> {ran.returncode}\n{ran.stdout}{ran.stderr}"
        return ran.stdout

    def json(self, *words: object) -> Any:
        return json.loads(self(*words, "--json"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The prefix that each image would have, by stage."""
    stages, prefixes = dockerfile.read_stages(DEPLOY / "Dockerfile"), dict[str, Path]()
    for stage in ("build", "build-cpu"):
        root = tmp_path_factory.mktemp(stage)
        prefixes[stage] = root / "opt" / "adaptory"
        # `python3` of the image is the one that runs the tests.
        (root / "bin").mkdir()
        (root / "bin" / "python3").symlink_to(Path(sys.executable).resolve())
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PATH", f"{root / 'bin'}:{os.environ['PATH']}")
            dockerfile.build(stages, stage, DEPLOY.parent, root / "src", prefixes[stage])
    return prefixes


def test_what_the_dockerfile_builds_plays_the_story_of_the_demo_through_https(
    images: dict[str, Path], tmp_path: Path
) -> None:
    stages = dockerfile.read_stages(DEPLOY / "Dockerfile")
    assert not list(images["build"].glob("lib/python*/site-packages/torch")), "a server needs no torch"
    settings = {
        "ADAPTORY_ACCESS": "tokens",
        "ADAPTORY_DRAIN_S": "1",
        "ADAPTORY_TRUSTED_PROXIES": "127.0.0.1",
        "ADAPTORY_DATABASE_URL": services.new_database(),
        **services.shared_s3().environment(f"smoke-{os.urandom(4).hex()}/"),
    }
    world = build_world(tmp_path / "world")
    admin = Installed(images["build-cpu"], {**settings, "ADAPTORY_HOME": str(tmp_path / "admin")})
    admin("migrate")
    admin("namespace", "grant", "*", "ann", "admin")
    token = admin.json("token", "create", "--user", "ann")["token"]
    with Stack(tmp_path, settings, [str(images["build"] / "bin" / "adaptory")]) as stack:
        entry, *words = dockerfile.command_of(stages, "api")
        assert (entry, words[0]) == ("adaptory", "serve")
        port = services.free_port()
        stack.server(port, *words[1:], ADAPTORY_HOME=str(tmp_path / "server"))
        worker = [str(images["build-cpu"] / "bin" / "adaptory"), *dockerfile.command_of(stages, "worker-cpu")[1:]]
        working = stack.start("worker", worker, ADAPTORY_HOME=str(tmp_path / "worker"))
        proxy = stack.proxy(port)
        client = Installed(
            images["build-cpu"],
            {
                "ADAPTORY_HOME": str(tmp_path / "client"),
                "ADAPTORY_URL": proxy.url,
                "ADAPTORY_TOKEN": token,
                "SSL_CERT_FILE": str(stack.certificate),
                "HF_HUB_OFFLINE": "1",
            },
        )
        _play(client, world, tmp_path)
        address = client.json("audit", "--event", "release:publish")["items"][0]["source"]
        assert address.startswith("127.0.0.1"), "the proxy says where requests come from"
        working.ask_to_stop()
        assert working.stopped() == 0, working.said()

    report = admin.json("backup", tmp_path / "backup")
    assert report["missing"] == {}
    empty = Installed(images["build"], {"ADAPTORY_HOME": str(tmp_path / "embedded")})
    assert empty.json("restore", tmp_path / "backup")["fsck"]["findings"] == []
    assert "acme/merged:1.0.0" in empty("log", "acme/merged")


def _play(client: Installed, world: World, tmp_path: Path) -> None:
    client("base", "add", world.base, "--name", "tiny")
    client("suite", "add", world.suites["sql"], world.suites["guard"])
    for name in ("sql", "support"):
        client("push", world.adapters[name], f"acme/{name}:1.0.0", "--base", "tiny")
    client("push", world.adapters["other-sql"], "acme/sql:1.1.0", "--base", "tiny", "--notes", "more tickets")
    client("eval", "acme/sql:1.0.0", "--suite", "sql-exact")
    client("gate", "acme/sql@prod", "--rule", "sql-exact.nll <= 100")
    client("promote", "acme/sql:1.0.0", "--to", "prod", "--reason", "first release")
    client("promote", "acme/sql:1.1.0", "--to", "prod", expect=1)
    client("promote", "acme/sql:1.1.0", "--to", "prod", "--force", "--reason", "in a hurry")
    client("rollback", "acme/sql@prod", "--reason", "no evidence")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        json.dumps(
            {
                "inputs": [
                    {"adapter": "acme/sql@prod", "weight": 1},
                    {"adapter": "acme/support:1.0.0", "weight": 0.1},
                ],
                "method": "linear",
                "adapter": "acme/both:1.0.0",
                "model": "acme/merged:1.0.0",
                "probe": 0,
                "evaluate": ["guard-exact"],
            }
        )
    )
    client("compose", recipe, "--follow")
    for name in ("both", "merged"):
        directory = tmp_path / "pulled" / name
        client("pull", f"acme/{name}:1.0.0", "-o", directory)
        for row in client.json("show", f"acme/{name}:1.0.0")["files"]:
            assert sha256((directory / row["path"]).read_bytes()).hexdigest() == row["sha256"]
    client("promote", "acme/merged:1.0.0", "--to", "prod", "--reason", "keeps what both teams had")
    assert client.json("show", "acme/sql@prod")["version"] == "1.0.0"
