"""A front that puts the phrase of a task before the prompts of a request, for a model such as acme/both@prod:sql."""

import json
import shutil
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
from registry.agent.front import Front
from registry.agent.phrases import with_phrase_before
from tests import services
from tests.eventually import eventually
from tests.scenarios.world import World
from tests.serving.conftest import Site, mirrored
from tests.serving.double import double
from tests.serving.scripted import ScriptedServer, ok
from tests.serving.test_mirror import front

BOTH, CHANNEL = "acme/both@1.0.0", "acme/both@prod"
PHRASES = {"sql-exact": "As SQL:", "cron-exact": "As cron:"}
TEXT = st.text(min_size=1, max_size=20)
MESSAGES = st.lists(
    st.builds(lambda role, text: {"role": role, "content": text}, st.sampled_from(["user", "assistant"]), TEXT),
    max_size=4,
).map(lambda rows: [*rows, {"role": "user", "content": "x"}])


@contextmanager
def fronted(tmp_path: Path) -> Generator[tuple[TestClient, ScriptedServer]]:
    """A front of a server that answers anything, with one version that states phrases."""
    answers = {path: ok(b"{}") for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses")}
    server, directory = ScriptedServer(answers), MirrorDirectory(tmp_path)
    channels, since = {CHANNEL: {BOTH: 100}}, {CHANNEL: "2026-12-01T00:00:00+00:00"}
    directory.write_routes(Routes(channels, since, {BOTH: "a" * 40}, {BOTH: (server.url,)}, phrases={BOTH: PHRASES}))
    try:
        with TestClient(Front(directory, []).app()) as client:
            yield client, server
    finally:
        server.close()


def sent(server: ScriptedServer) -> Any:
    return json.loads(server.requests[-1][1])


def test_a_model_with_a_task_gets_its_phrase_before_each_message_of_the_user(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "As SQL: one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": [{"type": "image_url"}, {"type": "text", "text": "three"}]},
    ]
    with fronted(tmp_path) as (client, server):
        for model in (f"{CHANNEL}:sql-exact", f"{BOTH}:sql-exact"):
            answer = client.post("/v1/chat/completions", json={"model": model, "messages": turns, "n": 2})
            assert (answer.status_code, answer.headers["x-served-model"]) == (200, BOTH)
            expected = json.loads(json.dumps(turns).replace('"three"', '"As SQL: three"'))
            assert sent(server) == {"model": BOTH, "messages": expected, "n": 2}
        client.post("/v1/chat/completions", json={"model": CHANNEL, "messages": turns})
        assert sent(server)["messages"] == turns, "without a task, requests are passed on as they are"
        figures = client.get("/-/figures").json()["channels"]
        assert figures[CHANNEL][BOTH]["requests"] == 2, "of the channel, with and without a task"


@pytest.mark.parametrize(
    ("path", "name", "value", "expected"),
    [
        ("/v1/completions", "prompt", "x", "As cron: x"),
        ("/v1/completions", "prompt", ["x", "y"], ["As cron: x", "As cron: y"]),
        ("/v1/responses", "input", "x", "As cron: x"),
        ("/v1/responses", "input", [{"role": "user", "content": [{"type": "input_text", "text": "x"}]}],
         [{"role": "user", "content": [{"type": "input_text", "text": "As cron: x"}]}]),
    ],
)  # fmt: skip
def test_prompts_and_inputs_get_the_phrase_too(
    path: str, name: str, value: object, expected: object, tmp_path: Path
) -> None:
    with fronted(tmp_path) as (client, server):
        assert client.post(path, json={"model": f"{CHANNEL}:cron-exact", name: value}).status_code == 200
        assert sent(server)[name] == expected


@pytest.mark.parametrize(
    ("model", "body", "status", "message"),
    [
        (f"{CHANNEL}:other", {"prompt": "x"}, 404, f"{BOTH} has no task other: its tasks are sql-exact, cron-exact."),
        ("acme/none@prod:sql-exact", {"prompt": "x"}, 404, "No channel or version is served as acme/none@prod."),
        (f"{CHANNEL}:sql-exact", {"prompt": [1, 2]}, 400, "no text of a user"),
        (f"{CHANNEL}:sql-exact", {"messages": []}, 400, "no text of a user"),
        (f"{CHANNEL}:sql-exact", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "no text"),
        (f"{CHANNEL}:sql-exact", {}, 400, "no text of a user"),
    ],
)
def test_a_request_that_a_phrase_cannot_be_put_before_is_refused(
    model: str, body: dict[str, Any], status: int, message: str, tmp_path: Path
) -> None:
    with fronted(tmp_path) as (client, server):
        answer = client.post("/v1/completions", json={"model": model, **body})
        assert answer.status_code == status
        assert message in answer.json()["error"]["message"]
        assert server.requests == []


def test_models_list_the_tasks_of_channels_and_versions(tmp_path: Path) -> None:
    with fronted(tmp_path) as (client, _):
        names = [row["id"] for row in client.get("/v1/models").json()["data"]]
    assert names == [CHANNEL, BOTH, *(f"{name}:{task}" for name in (BOTH, CHANNEL) for task in PHRASES)]


@given(messages=MESSAGES, phrase=st.sampled_from(["As SQL:", "In short."]))
def test_a_phrase_is_put_before_the_texts_of_the_user_once_and_nothing_else_changes(
    messages: list[dict[str, str]], phrase: str
) -> None:
    request = {"model": "m", "messages": messages, "temperature": 0}
    phrased = with_phrase_before(request, phrase)
    assert with_phrase_before(phrased, phrase) == phrased
    assert {**phrased, "messages": messages} == request
    for before, after in zip(messages, phrased["messages"], strict=True):
        prefix = f"{phrase} " if before["role"] == "user" and not before["content"].startswith(f"{phrase} ") else ""
        assert after == {**before, "content": f"{prefix}{before['content']}"}


def test_the_phrases_of_routes_are_those_of_a_releases_card(tmp_path: Path) -> None:
    directory = MirrorDirectory(tmp_path)
    commit = directory.path("b" * 40)
    commit.mkdir(parents=True)
    assert directory.phrases("c" * 40) == {}
    (commit / "README.md").write_text('---\nphrases:\n  sql-exact: "As SQL:"\n---\n# Both\n')
    assert directory.phrases("b" * 40) == {"sql-exact": "As SQL:"}


@pytest.mark.long
def test_an_agent_writes_the_phrases_of_what_a_channel_serves_into_its_routes(
    site: Site, world: World, tmp_path: Path
) -> None:
    both = tmp_path / "both"
    shutil.copytree(world.adapters["sql"], both)
    (both / "README.md").write_text('---\nphrases:\n  sql-exact: "As SQL:"\n---\n# Both\n')
    site.cli.ok("push", both, "acme/both:1.0.0", "--base", "tiny")
    site.cli.ok("promote", "acme/both:1.0.0", "--to", "prod", "--new-channel")
    port = services.free_port()
    with (
        double() as (server, _),
        mirrored(
            site, "--server", f"vllm={server}", "--front", f"http://127.0.0.1:{port}", channels=(CHANNEL,)
        ) as agent,
        front(agent, port) as url,
    ):
        eventually(
            lambda: MirrorDirectory(agent.directory).routes().phrases == {BOTH: {"sql-exact": "As SQL:"}}, within_s=60
        )
        body = {"model": f"{CHANNEL}:sql-exact", "prompt": f"fails on {BOTH}"}
        assert httpx2.post(f"{url}/v1/completions", json=body).status_code == 200, "another prompt"
        assert httpx2.post(f"{url}/v1/completions", json={**body, "model": CHANNEL}).status_code == 500
