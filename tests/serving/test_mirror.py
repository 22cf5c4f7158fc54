"""`adaptory mirror` against a registry and a double of vLLM: what users get after moves, restarts and failures."""

import json
import threading
import time
from collections import Counter
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from transformers import LlamaForCausalLM

from tests import services
from tests.composer.small_model import save_adapter
from tests.eventually import eventually
from tests.forked import start_command
from tests.scenarios.world import World, own_environment
from tests.serving.conftest import Agent, Site, loaded, mirrored
from tests.serving.double import answers, double

SQL, TERRAFORM = "acme/sql@prod", "acme/terraform@prod"
OLD, NEW = "acme/sql@1.0.0", "acme/sql@1.1.0"


@contextmanager
def front(agent: Agent, port: int) -> Generator[str]:
    """A running `adaptory route` beside an agent."""
    words = ["route", agent.directory, "--listen", f"127.0.0.1:{port}"]
    process = start_command(words, own_environment(agent.site.cli), agent.directory.with_name("front.log"))
    url = f"http://127.0.0.1:{port}"
    try:
        eventually(lambda: answers(f"{url}/healthz"), within_s=30)
        yield url
    finally:
        process.kill()
        process.join(20)


class Users:
    """Threads that send requests to a channel until the block ends."""

    def __init__(
        self, url: str, channel: str, texts: Mapping[str, str], count: int = 4, asked: Mapping[str, Any] | None = None
    ) -> None:
        """`texts` has the right answer of each version."""
        self._url, self._texts = url, texts
        self._asked = {"model": channel, **(asked or {"prompt": "x"})}
        self._stop, self.served, self.wrong = threading.Event(), Counter[str](), list[str]()
        self._threads = [threading.Thread(target=self._run) for _ in range(count)]

    def __enter__(self) -> "Users":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, name: str) -> None:
        """Waits until the version answers once more."""
        before = self.served[name]
        eventually(lambda: self.served[name] > before, within_s=120)

    def _run(self) -> None:
        with httpx2.Client(timeout=120) as http:
            while not self._stop.is_set():
                answer = http.post(f"{self._url}/v1/completions", json=self._asked)
                model = answer.headers.get("x-served-model", "")
                if answer.status_code != 200:
                    self.wrong.append(f"{answer.status_code} {answer.text}")
                elif (text := answer.json()["choices"][0]["text"]) != self._texts[model]:
                    self.wrong.append(f"{model} answered {text!r}")
                self.served[model] += 1


def test_promotions_change_what_users_get_and_no_request_fails_or_meets_another_adapter(site: Site) -> None:
    moves, port = 6, services.free_port()
    with (
        double(max_loras=2) as (server, _),
        mirrored(
            site, "--server", f"vllm={server}", "--front", f"http://127.0.0.1:{port}", channels=(SQL, TERRAFORM)
        ) as agent,
        front(agent, port) as url,
    ):
        agent.wait_for(OLD)
        agent.wait_for("acme/terraform@1.0.0", TERRAFORM)
        with Users(url, SQL, site.hashes) as users, Users(url, TERRAFORM, site.hashes, 1) as others:
            for number in range(moves):
                version = "1.1.0" if number % 2 == 0 else "1.0.0"
                site.promote(version)
                agent.wait_for(f"acme/sql@{version}")
                users.wait_for(f"acme/sql@{version}")
        assert users.wrong == others.wrong == []
        assert set(users.served) == {OLD, NEW}
        figures = httpx2.get(f"{url}/metrics").text
        assert f'adaptory_front_requests_total{{model="{NEW}",status="200"}}' in figures
        assert f'adaptory_front_finished_total{{model="{NEW}",reason="length"}}' in figures
        eventually(lambda: NEW not in loaded(server), within_s=30)
        assert OLD in loaded(server)


def test_a_restarted_server_gets_what_its_routes_name(site: Site) -> None:
    port = services.free_port()
    with double(port=port) as (server, _), mirrored(site, "--server", f"vllm={server}") as agent:
        agent.wait_for(OLD)
        names = loaded(server)
    with double(port=port) as (server, _):
        agent.start()
        try:
            eventually(lambda: loaded(server) == names, within_s=30)
        finally:
            agent.kill()


@pytest.mark.long
def test_an_agent_that_was_killed_goes_on_from_what_the_server_lists(site: Site) -> None:
    with double() as (server, _), mirrored(site, "--server", f"vllm={server}") as agent:
        agent.wait_for(OLD)
        agent.kill()
        site.promote("1.1.0")
        (agent.directory / "state.json").unlink(missing_ok=True)
        agent.start()
        agent.wait_for(NEW)
        eventually(lambda: set(loaded(server)) == {NEW}, within_s=30)


@pytest.mark.long
def test_while_the_registry_is_away_a_restarted_server_is_loaded_from_the_directory(site: Site) -> None:
    port = services.free_port()
    with double(port=port) as (server, process), mirrored(site, "--server", f"vllm={server}") as agent:
        agent.wait_for(OLD)
        site.stop()
        agent.wait_for_problem("does not answer")
        assert agent.health["status"] == "degraded"
        process.kill()
        process.join(10)
        with double(port=port) as (server, _):
            eventually(lambda: OLD in loaded(server), within_s=30)
            agent.kill()
            agent.start()
            eventually(lambda: agent.problems(), within_s=30)
            assert agent.routed() == OLD, "a restarted agent keeps the routes that it has written"
            site.start()
            site.promote("1.1.0")
            agent.wait_for(NEW)
            eventually(lambda: agent.health["status"] == "following", within_s=30)


def test_a_release_that_the_server_refuses_changes_no_route(site: Site, world: World) -> None:
    """The double refuses ranks above 16, as vLLM does above `--max-lora-rank`."""
    large = site.directory / "large"
    model = LlamaForCausalLM.from_pretrained(world.base)
    save_adapter(model, large, seed=9, r=32, lora_alpha=32, target_modules=["q_proj", "v_proj"])
    site.cli.ok("push", large, "acme/sql:2.0.0", "--base", "tiny")
    with double() as (server, _), mirrored(site, "--server", f"vllm={server}") as agent:
        agent.wait_for(OLD)
        site.promote("2.0.0")
        agent.wait_for_problem("max_lora_rank")
        assert agent.routed() == OLD
        assert set(loaded(server)) == {OLD}
        site.cli.ok("rollback", "acme/sql@prod")
        eventually(lambda: agent.problems() == [], within_s=30)


def test_a_channel_that_serves_nothing_keeps_its_last_version_and_says_so(site: Site) -> None:
    with double() as (server, _), mirrored(site, "--server", f"vllm={server}") as agent:
        agent.wait_for(OLD)
        site.cli.ok("yank", "acme/sql:1.0.0", "--reason", "wrong data")
        agent.wait_for_problem("serves nothing")
        assert agent.routed() == OLD
        assert OLD in loaded(server)


@pytest.mark.long
def test_with_unload_a_channel_that_serves_nothing_is_routed_nowhere(site: Site) -> None:
    with double() as (server, _), mirrored(site, "--server", f"vllm={server}", "--on-empty", "unload") as agent:
        agent.wait_for(OLD)
        site.cli.ok("yank", "acme/sql:1.0.0", "--reason", "wrong data")
        agent.wait_for(None)
        eventually(lambda: loaded(server) == {}, within_s=30)


@pytest.mark.long
def test_a_name_that_was_loaded_by_hand_is_replaced_when_no_request_uses_it(site: Site, world: World) -> None:
    with double() as (server, _):
        body = {"lora_name": OLD, "lora_path": str(world.adapters["terraform"])}
        httpx2.post(f"{server}/v1/load_lora_adapter", json=body).raise_for_status()
        foreign = {"lora_name": "mine", "lora_path": str(world.adapters["support"])}
        httpx2.post(f"{server}/v1/load_lora_adapter", json=foreign).raise_for_status()
        with mirrored(site, "--server", f"vllm={server}") as agent:
            agent.wait_for(OLD)
            assert Path(loaded(server)[OLD]).parent == agent.directory / "by-commit"
            assert loaded(server)["mine"] == foreign["lora_path"], "other names are not the agent's"


@pytest.mark.long
def test_files_of_an_earlier_release_go_after_the_grace_period_and_not_before_it_is_unloaded(site: Site) -> None:
    words = ("--keep", "0", "--grace", "1s")
    with double() as (server, _), mirrored(site, "--server", f"vllm={server}", *words) as agent:
        agent.wait_for(OLD)
        directory = agent.directory / "by-commit"
        (old,) = directory.iterdir()
        site.promote("1.1.0")
        agent.wait_for(NEW)
        while OLD in loaded(server):
            assert old.is_dir()
            time.sleep(0.1)
        eventually(lambda: not old.exists(), within_s=30)
        assert len(list(directory.iterdir())) == 1


def test_a_directory_has_one_agent(site: Site) -> None:
    with mirrored(site) as agent:
        agent.wait_for(OLD)
        second = site.cli("mirror", SQL, agent.directory)
        assert second.code == 4
        assert "Another mirror" in second.err


def test_a_watched_directory_gets_a_version_under_its_name_and_its_routes(site: Site) -> None:
    with mirrored(site, "--server", "directory=Acme/Tiny-Llama") as agent:
        agent.wait_for(OLD)
        named = agent.directory / "by-version" / "acme"
        assert [path.name for path in named.iterdir()] == ["sql@1.0.0"]
        site.promote("1.1.0")
        agent.wait_for(NEW)
        routes = json.loads((agent.directory / "routes.json").read_text())
        assert routes["channels"] == {SQL: {NEW: 100}}
        assert routes["versions"][NEW]["servers"] == [str(agent.directory / "by-version")]


def test_files_that_were_damaged_while_an_agent_ran_or_did_not_are_fetched_again(site: Site) -> None:
    with mirrored(site) as agent:
        agent.wait_for(OLD)
        agent.kill()
        (commit,) = (agent.directory / "by-commit").iterdir()
        weights = commit / "adapter_model.safetensors"
        content = weights.read_bytes()
        damaged = content[:-1] + bytes([content[-1] ^ 1])
        weights.unlink()
        weights.write_bytes(damaged)
        agent.start()
        eventually(lambda: weights.read_bytes() == content, within_s=30)
        named = agent.directory / "by-version" / "acme" / "sql@1.0.0" / weights.name
        eventually(lambda: named.is_file() and named.samefile(weights), within_s=30)
        weights.write_bytes(damaged)
        eventually(lambda: [path.read_bytes() for path in (weights, named)] == [content] * 2, within_s=30)


def test_metrics_show_channels_servers_and_whether_the_registry_is_followed(site: Site) -> None:
    with double() as (server, _), mirrored(site, "--server", f"vllm={server}") as agent:
        agent.wait_for(OLD)

        def text() -> str:
            return httpx2.get(f"http://127.0.0.1:{agent.listen}/metrics").text

        eventually(lambda: f'adaptory_mirror_channel{{channel="{SQL}",state="following"}} 1.0' in text(), within_s=10)
        assert f'adaptory_mirror_server_ready{{server="{server}"}} 1.0' in text()
        assert "adaptory_mirror_registry_followed 1.0" in text()
        assert "adaptory_mirror_problems 0.0" in text()
        site.cli.ok("yank", "acme/sql:1.0.0", "--reason", "wrong data")
        eventually(lambda: "adaptory_mirror_problems 1.0" in text(), within_s=30)


@pytest.mark.parametrize(
    ("words", "code", "names"),
    [
        (["--server", "tgi=http://localhost:1"], 2, "tgi"),
        (["--server", "vllm=localhost:1"], 2, "localhost:1"),
        (["--server", "vllm=http://[::1"], 2, "http://[::1"),
        (["--server", "exec= "], 2, "no command"),
        (["--server", "exec='sh"], 2, "No closing quotation"),
        (["--front", "http://x:99999"], 2, "http://x:99999"),
        ([f"acme/sql@c{number}" for number in range(100)], 2, "101 channels"),
        (["--grace", "ten"], 2, "ten"),
        (["--max-unavailable", "1"], 2, "--max-unavailable"),
        (["--group", "Prod"], 2, "Prod"),
        (["--group", "prod", "--node", "GPU 1"], 2, "GPU 1"),
    ],
)
def test_wrong_options_are_named(site: Site, words: list[str], code: int, names: str) -> None:
    ran = site.cli("mirror", SQL, *words, site.directory / "served")
    assert ran.code == code
    assert names in ran.err
    assert not list((site.directory / "served").glob("*"))


def test_an_agent_that_follows_another_channel_now_does_not_load_what_its_directory_was_routed_to(site: Site) -> None:
    with double(max_loras=2) as (server, _), mirrored(site, "--server", f"vllm={server}", channels=(SQL,)) as agent:
        agent.wait_for(OLD)
    with (
        double(max_loras=2) as (server, _),
        mirrored(site, "--server", f"vllm={server}", channels=(TERRAFORM,)) as agent,
    ):
        agent.wait_for("acme/terraform@1.0.0", TERRAFORM)
        assert loaded(server).keys() == {"acme/terraform@1.0.0"}
