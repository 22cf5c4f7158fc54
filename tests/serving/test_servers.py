"""The kinds of servers, each by the same contract; and what the naive ways of a switch do to vLLM's double."""

import json
import sys
import threading
from collections.abc import Generator
from contextlib import ExitStack
from pathlib import Path

import httpx2
import pytest

from registry.agent.directory import MirrorDirectory
from registry.agent.servers.command import CommandServer
from registry.agent.servers.files import DirectoryServer
from registry.agent.servers.protocol import Server
from registry.agent.servers.sglang import SglangServer
from registry.agent.servers.vllm import VllmServer
from registry.agent.versions import ServedVersion
from registry.errors import Refused, Unavailable
from tests.eventually import eventually
from tests.scenarios.world import World
from tests.serving.conftest import converted, llama_processes
from tests.serving.contract import (
    COMMIT,
    one_release,
    test_a_name_that_is_not_loaded_fails_its_check,
    test_a_second_load_of_the_same_directory_and_an_unload_of_nothing_are_no_errors,
    test_a_server_that_refuses_is_quoted,
    test_a_version_is_listed_with_its_directory_until_it_is_unloaded,
    version,
)
from tests.serving.double import double
from tests.serving.llama_server import command, port_range

__all__ = [
    "test_a_name_that_is_not_loaded_fails_its_check",
    "test_a_second_load_of_the_same_directory_and_an_unload_of_nothing_are_no_errors",
    "test_a_server_that_refuses_is_quoted",
    "test_a_version_is_listed_with_its_directory_until_it_is_unloaded",
]
KINDS = ("vllm", "sglang", "directory", "exec", "llamacpp")
SCRIPT = """
import json, pathlib, sys
names = pathlib.Path(sys.argv[1])
known = json.loads(names.read_text()) if names.exists() else {}
request = json.load(sys.stdin)
if request["do"] == "load":
    if not pathlib.Path(request["directory"], "adapter_config.json").exists():
        sys.exit("No adapter there.")
    known[request["name"]] = request["directory"]
if request["do"] == "unload":
    known.pop(request["name"], None)
if request["do"] == "check" and request["name"] not in known:
    sys.exit("No such name.")
names.write_text(json.dumps(known))
if request["do"] == "loaded":
    print(json.dumps(known))
if request["do"] == "busy":
    print("[]")
"""


@pytest.fixture
def directory(tmp_path: Path, world: World) -> MirrorDirectory:
    return one_release(tmp_path / "served", world.adapters["sql"])


@pytest.fixture(params=KINDS)
def server(request: pytest.FixtureRequest, directory: MirrorDirectory, tmp_path: Path) -> Generator[Server]:
    with ExitStack() as stack:
        opened: Server
        if request.param == "directory":
            opened = DirectoryServer(directory, "Acme/Tiny-Llama")
        elif request.param == "exec":
            script = tmp_path / "server.py"
            script.write_text(SCRIPT)
            opened = CommandServer(f"{sys.executable} {script} {tmp_path / 'names.json'}")
        elif request.param == "llamacpp":
            text = command(request.getfixturevalue("llama"), port_range())
            for number in ("1.0.0", "1.1.0"):
                converted(directory, version(number), request.getfixturevalue("llama"))
            opened = stack.enter_context(llama_processes(text, directory))
        else:
            url, _ = stack.enter_context(double(request.param))
            opened = VllmServer(url) if request.param == "vllm" else SglangServer(url)
        stack.callback(opened.close)
        yield opened


def test_a_server_that_is_away_is_unreachable(world: World) -> None:
    with double() as (url, process):
        opened = VllmServer(url)
        process.kill()
        process.join(10)
        with pytest.raises(Unavailable, match="does not answer"):
            opened.loaded()
    with pytest.raises(Unavailable, match="cannot be run"):
        CommandServer("/no/such/command").loaded()


def test_a_command_must_print_what_its_contract_says() -> None:
    with pytest.raises(Unavailable, match="JSON"):
        CommandServer("echo names").loaded()
    with pytest.raises(Refused, match="ended with 1"):
        CommandServer("false").loaded()


def test_requests_that_run_are_busy_by_the_newest_sample(directory: MirrorDirectory) -> None:
    with double(seconds=1.5) as (url, _):
        opened = VllmServer(url)
        opened.load(version(), directory.path(COMMIT))
        thread = threading.Thread(target=ask, args=(url, "acme/sql@1.0.0"))
        thread.start()
        eventually(lambda: opened.busy() == {"acme/sql@1.0.0"}, within_s=5)
        thread.join()
        assert opened.busy() == frozenset()


def test_by_version_is_made_of_links_and_names_the_servers_base(directory: MirrorDirectory) -> None:
    server = DirectoryServer(directory, "Acme/Tiny-Llama")
    server.load(version(), directory.path(COMMIT))
    made = Path(server.loaded()["acme/sql@1.0.0"])
    weights = "adapter_model.safetensors"
    assert (made / weights).stat().st_ino == (directory.path(COMMIT) / weights).stat().st_ino
    assert json.loads((made / "adapter_config.json").read_text())["base_model_name_or_path"] == "Acme/Tiny-Llama"
    own = json.loads((directory.path(COMMIT) / "adapter_config.json").read_text())
    assert own["base_model_name_or_path"] != "Acme/Tiny-Llama", "the release's own file stays as it was published"


def ask(url: str, model: str) -> int:
    return httpx2.post(f"{url}/v1/completions", json={"model": model, "prompt": "x"}, timeout=30).status_code


def test_loading_another_path_under_a_name_kills_the_double(directory: MirrorDirectory) -> None:
    """The switch by unload and load: a request of the old id runs, one of the new id comes, then a third adapter."""
    path = str(directory.path(COMMIT))
    with double(seconds=1.0, max_loras=2) as (url, _):
        for name in ("acme/sql@prod", "acme/terraform@prod"):
            httpx2.post(f"{url}/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path}).raise_for_status()
        codes: list[int] = []
        asked = [
            threading.Thread(target=lambda name=name: codes.append(ask(url, name)))
            for name in ("acme/sql@prod", "acme/sql@prod", "acme/terraform@prod")
        ]
        asked[0].start()
        eventually(lambda: "sql@prod" in httpx2.get(f"{url}/metrics").text, within_s=5)
        httpx2.post(f"{url}/v1/unload_lora_adapter", json={"lora_name": "acme/sql@prod"}).raise_for_status()
        body = {"lora_name": "acme/sql@prod", "lora_path": path}
        httpx2.post(f"{url}/v1/load_lora_adapter", json=body).raise_for_status()
        for thread in asked[1:]:
            thread.start()
        for thread in asked:
            thread.join()
        assert 500 in codes
        assert ask(url, "base-model") == 500, "requests to the base fail too"


def test_removing_the_directory_of_a_loaded_name_kills_the_double(directory: MirrorDirectory, world: World) -> None:
    with double(max_loras=1) as (url, _):
        opened = VllmServer(url)
        opened.load(version(), directory.path(COMMIT))
        opened.load(ServedVersion("acme/terraform", "1.0.0", COMMIT), world.adapters["terraform"])
        assert ask(url, "acme/sql@1.0.0") == ask(url, "acme/terraform@1.0.0") == 200
        directory.remove(COMMIT)
        assert ask(url, "acme/sql@1.0.0") == 500, "it was evicted, and is read again"
        assert ask(url, "acme/terraform@1.0.0") == 500
