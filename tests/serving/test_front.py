"""`adaptory route`: which version answers a request, and what a front passes on and counts."""

import json
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from registry.agent.directory import MirrorDirectory, Routes
from registry.agent.front import Front, choose
from tests.scenarios.world import World
from tests.serving.double import double

OLD, NEW, CHANNEL = "acme/sql@1.0.0", "acme/sql@1.1.0", "acme/sql@prod"


@given(
    weights=st.dictionaries(st.text(min_size=1), st.integers(0, 1000), min_size=1).filter(
        lambda weights: sum(weights.values()) > 0
    ),
    user=st.text(),
)
def test_a_user_gets_one_version_and_never_one_without_weight(weights: dict[str, int], user: str) -> None:
    chosen = choose(weights, user)
    assert weights[chosen] > 0
    assert choose(weights, user) == chosen


def test_weights_are_shares_of_users() -> None:
    chosen = Counter(choose({OLD: 90, NEW: 10}, f"user {number}") for number in range(20_000))
    assert 1_700 < chosen[NEW] < 2_300


def test_a_larger_weight_moves_no_user_back() -> None:
    users = [f"user {number}" for number in range(2_000)]
    ten = {user for user in users if choose({OLD: 90, NEW: 10}, user) == NEW}
    fifty = {user for user in users if choose({OLD: 50, NEW: 50}, user) == NEW}
    assert ten <= fifty


@contextmanager
def fronted(tmp_path: Path, world: World, kind: str = "vllm", **given: Any) -> Generator[tuple[TestClient, str, Front]]:
    """A front of a double that has two versions loaded; the channel's weights are 50 to 50."""
    directory = MirrorDirectory(tmp_path)
    with double(kind, **given) as (url, _):
        for name, adapter in ((OLD, "sql"), (NEW, "other-sql")):
            body = {"lora_name": name, "lora_path": str(world.adapters[adapter])}
            httpx2.post(f"{url}/v1/load_lora_adapter", json=body).raise_for_status()
        routes = Routes(
            channels={CHANNEL: {OLD: 50, NEW: 50}},
            since={CHANNEL: "2026-12-01T00:00:00+00:00"},
            commits={OLD: "a" * 40, NEW: "b" * 40},
            servers={OLD: (url,), NEW: (url,)},
        )
        directory.write_routes(routes)
        front = Front(directory, [])
        with TestClient(front.app()) as client:
            yield client, url, front


def request(model: str, **more: Any) -> dict[str, Any]:
    return {"model": model, "prompt": "x", **more}


def test_a_channel_becomes_a_version_and_a_user_keeps_it(tmp_path: Path, world: World) -> None:
    with fronted(tmp_path, world) as (client, _, _):
        served = {
            user: {
                client.post("/v1/completions", json=request(CHANNEL, user=user)).headers["x-served-model"]
                for _ in range(3)
            }
            for user in map(str, range(12))
        }
        assert all(len(versions) == 1 for versions in served.values())
        assert set().union(*served.values()) == {OLD, NEW}
        named = client.post("/v1/completions", json=request(NEW))
        assert named.json()["model"] == named.headers["x-served-model"] == NEW
        counted = client.get("/-/figures").json()["channels"]
        assert counted.keys() == {CHANNEL}
        assert sum(row["requests"] for row in counted[CHANNEL].values()) == 36, "without the one to a version by name"


def test_a_stream_is_passed_on_and_its_tokens_and_end_are_counted(tmp_path: Path, world: World) -> None:
    with fronted(tmp_path, world) as (client, url, _):
        direct = httpx2.post(f"{url}/v1/completions", json=request(NEW, stream=True)).content
        assert client.post("/v1/completions", json=request(NEW, stream=True)).content == direct
        figures = client.get("/metrics").text
        assert f'adaptory_front_tokens_total{{kind="completion",model="{NEW}"}} 1.0' in figures
        assert f'adaptory_front_finished_total{{model="{NEW}",reason="length"}} 1.0' in figures
        assert client.get("/-/under-way").json() == {}


def test_what_loads_and_unloads_adapters_is_not_for_users(tmp_path: Path, world: World) -> None:
    with fronted(tmp_path, world) as (client, _, _):
        for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/load_lora_adapter", "/sleep"):
            assert client.post(path, json={"lora_name": OLD, "lora_path": "/"}).status_code == 404


def test_a_server_that_was_restarted_is_passed_over_while_another_has_the_version(tmp_path: Path, world: World) -> None:
    with fronted(tmp_path, world) as (client, url, front), double() as (empty, _):
        routes = front.table.routes
        servers = {NEW: (empty, url, "http://127.0.0.1:9")}
        MirrorDirectory(tmp_path).write_routes(Routes({CHANNEL: {NEW: 100}}, routes.since, routes.commits, servers))
        for _ in range(6):
            assert client.post("/v1/completions", json=request(CHANNEL)).status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"not json", 400, "JSON object"),
        (b"[1]", 400, "JSON object"),
        (b'{"model": 3}', 400, "not a text"),
        (b'{"model": "acme/sql@staging"}', 404, "acme/sql@staging"),
    ],
)
def test_requests_that_name_nothing_get_an_error_of_the_openai_api(
    tmp_path: Path, world: World, body: bytes, status: int, words: str
) -> None:
    with fronted(tmp_path, world) as (client, _, _):
        answer = client.post("/v1/completions", content=body)
        assert answer.status_code == status
        assert words in answer.json()["error"]["message"]


def test_without_a_server_the_answer_is_503(tmp_path: Path) -> None:
    directory = MirrorDirectory(tmp_path)
    directory.write_routes(Routes({CHANNEL: {OLD: 100}}, {}, {OLD: "a" * 40}, {}))
    with TestClient(Front(directory, []).app()) as client:
        assert client.post("/v1/completions", json=request(CHANNEL)).status_code == 503
        assert client.get("/-/under-way").json() == {}


def test_models_are_the_channels_and_versions_of_the_routes(tmp_path: Path, world: World) -> None:
    with fronted(tmp_path, world) as (client, _, _):
        names = {row["id"] for row in client.get("/v1/models").json()["data"]}
        assert names == {CHANNEL, OLD, NEW}
        assert json.loads(client.get("/healthz").text)["channels"] == 1
