"""What clients and servers may send through a front without breaking it for others."""

import json
import socket
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest

from registry.agent.directory import MirrorDirectory, Routes
from registry.agent.front import Front
from tests.eventually import eventually
from tests.serving.scripted import Answer, ScriptedServer, listening, ok, scripted

VERSION, CHANNEL, PATH = "acme/sql@1.0.0", "acme/sql@prod", "/v1/completions"
SINCE = "2026-01-01T00:00:00+00:00"
ANSWER = {"choices": [{"text": "x", "finish_reason": "stop"}], "usage": {"prompt_tokens": 1}}


@contextmanager
def fronted(directory: Path, answer: Answer) -> Generator[tuple[str, Front, ScriptedServer]]:
    """A front on a port, of one server that answers completions in this way."""
    with scripted({PATH: answer}) as server:
        kept = MirrorDirectory(directory)
        routes = Routes({CHANNEL: {VERSION: 100}}, {CHANNEL: SINCE}, {VERSION: "a" * 40}, {VERSION: (server.url,)})
        kept.write_routes(routes)
        front = Front(kept, [])
        with listening(front.app()) as url:
            yield url, front, server


def post(url: str, body: bytes | dict[str, Any], **given: Any) -> httpx2.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx2.post(url + PATH, content=content, timeout=20, **given)


def counted(front: Front) -> bool:
    """Whether no request is under way."""
    return not front.figures.under_way


def test_a_client_that_leaves_before_the_answer_begins_is_no_longer_under_way(tmp_path: Path) -> None:
    left = threading.Event()

    def late(connection: socket.socket, _body: bytes) -> None:
        left.wait(10)
        time.sleep(0.3)
        connection.sendall(ok(json.dumps(ANSWER).encode()))

    with fronted(tmp_path, late) as (url, front, _):
        host, _, port = url.removeprefix("http://").partition(":")
        body = json.dumps({"model": CHANNEL}).encode()
        with socket.create_connection((host, int(port))) as client:
            client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            eventually(lambda: front.figures.under_way[VERSION] == 1, within_s=5)
        left.set()
        eventually(lambda: counted(front), within_s=5)


def test_a_client_that_reads_nothing_and_leaves_is_no_longer_under_way(tmp_path: Path) -> None:
    """Its second request waits to begin its answer until the first answer, of 32 MB, has been read."""
    with fronted(tmp_path, ok(b"x" * (32 << 20), "text/plain")) as (url, front, server):
        host, _, port = url.removeprefix("http://").partition(":")
        body = json.dumps({"model": CHANNEL}).encode()
        text = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        with socket.create_connection((host, int(port))) as client:
            client.sendall(text * 3)
            eventually(lambda: server.requests, within_s=5)
            time.sleep(0.5)
        eventually(lambda: counted(front), within_s=5)


def test_a_client_that_leaves_a_stream_is_no_longer_under_way_and_its_server_notices(tmp_path: Path) -> None:
    broke = threading.Event()

    def endless(connection: socket.socket, _body: bytes) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        try:
            while True:
                connection.sendall(b'data: {"choices": []}\n\n')
                time.sleep(0.02)
        except OSError:
            broke.set()

    with fronted(tmp_path, endless) as (url, front, _):
        with httpx2.stream("POST", url + PATH, json={"model": CHANNEL}) as answer:
            chunks = answer.iter_raw()
            next(chunks)
            assert front.figures.under_way[VERSION] == 1
        eventually(lambda: counted(front), within_s=5)
        assert broke.wait(5)


@pytest.mark.parametrize("model", ["\ud800", "x\r\nx-served-model: y", "x" * 100_000, "\0", "Grüße", ""])
def test_no_name_of_a_model_breaks_metrics_or_the_count_of_requests(tmp_path: Path, model: str) -> None:
    with fronted(tmp_path, ok(json.dumps(ANSWER).encode())) as (url, front, _):
        assert post(url, {"model": model}).status_code in (200, 400)
        assert counted(front)
        text = httpx2.get(f"{url}/metrics").raise_for_status().text
        assert len(text) < 20_000
        assert httpx2.get(f"{url}/-/under-way").raise_for_status().json() == {}


def test_names_that_clients_make_up_cost_no_memory(tmp_path: Path) -> None:
    with fronted(tmp_path, ok(json.dumps(ANSWER).encode())) as (url, _, _):
        post(url, {"model": "first"})
        before = len(httpx2.get(f"{url}/metrics").text)
        for number in range(20):
            post(url, {"model": f"made-up-{number}"})
        assert len(httpx2.get(f"{url}/metrics").text) < before + 200


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "acme/sql@1.0.0", "model": "base"}',
        '{"model": "acme/sql@1.0.0", "model": "base"}'.encode("utf-16"),
    ],
)
def test_a_server_reads_the_name_that_the_front_has_counted(tmp_path: Path, body: bytes) -> None:
    with fronted(tmp_path, ok(b"{}")) as (url, _, server):
        post(url, body)
        assert server.requests[0][1].decode().count("model") == 1
        assert json.loads(server.requests[0][1]) == {"model": "base"}


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"model": "x", "a": ' + b"[" * 100_000, b"\xff\xfe", b""])
def test_a_body_that_cannot_be_read_is_refused(tmp_path: Path, body: bytes) -> None:
    with fronted(tmp_path, ok(b"{}")) as (url, _, server):
        assert post(url, body).status_code == 400
        assert server.requests == []


def test_no_depth_of_a_body_breaks_the_front(tmp_path: Path) -> None:
    with fronted(tmp_path, ok(json.dumps(ANSWER).encode())) as (url, front, _):
        for depth in range(900, 1000):  # the deepest body that can be read, and all near it
            body = b'{"model": "acme/sql@prod", "x": ' + b"[" * depth + b"]" * depth + b"}"
            assert post(url, body).status_code in (200, 400)
        assert counted(front)


def test_only_sets_have_a_name_for_their_base(tmp_path: Path) -> None:
    with fronted(tmp_path, ok(json.dumps(ANSWER).encode())) as (url, front, server):
        kept = MirrorDirectory(tmp_path)
        kept.write_routes(replace(kept.routes(), bases={server.url: "base-model"}))
        assert post(url, {"model": "made-up#base"}).status_code == 200
        assert json.loads(server.requests[-1][1])["model"] == "made-up#base"
        assert counted(front)


def test_a_user_may_have_any_text(tmp_path: Path) -> None:
    with fronted(tmp_path, ok(b"{}")) as (url, _, _):
        assert post(url, {"model": CHANNEL, "user": "\ud800"}).status_code == 200


def test_headers_of_a_connection_end_there_and_all_others_arrive_as_they_are(tmp_path: Path) -> None:
    body = json.dumps(ANSWER).encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close, X-Hop\r\nX-Hop: 1\r\n".encode()
    answer = head + "X-Name: Grüße €\r\nDate: today\r\nServer: mine\r\n\r\n".encode() + body
    with fronted(tmp_path, answer) as (url, front, server):
        sent = [(b"Connection", b"keep-alive, x-secret"), (b"X-Secret", b"1"), (b"X-Client", "Grüße".encode("latin-1"))]
        passed = httpx2.post(url + PATH, json={"model": CHANNEL}, headers=sent)
        assert passed.json() == ANSWER
        assert "x-hop" not in passed.headers
        assert len(passed.headers.get_list("date")) == 1
        assert "Grüße €".encode() in dict(passed.headers.raw).values()
        seen = server.requests[0][0].lower()
        assert b"x-secret" not in seen
        assert "x-client: grüße".encode("latin-1") in seen
        assert counted(front)


@pytest.mark.parametrize(
    "document",
    [
        {"choices": 5},
        {"choices": {"a": 1}},
        {"choices": [{"finish_reason": {"a": 1}}]},
        {"usage": {"prompt_tokens": 10**400}},
        {"usage": {"prompt_tokens": -5}},
        [1],
    ],
)
def test_an_answer_of_any_form_is_passed_on(tmp_path: Path, document: object) -> None:
    body = json.dumps(document).encode()
    with fronted(tmp_path, ok(body)) as (url, front, _):
        assert post(url, {"model": CHANNEL}).content == body
        assert counted(front)
        assert 'status="200"' in httpx2.get(f"{url}/metrics").text


def test_a_deep_answer_is_passed_on(tmp_path: Path) -> None:
    body = b"[" * 50_000
    with fronted(tmp_path, ok(body)) as (url, _, _):
        assert post(url, {"model": CHANNEL}).content == body


def test_finish_reasons_that_a_server_makes_up_are_one(tmp_path: Path) -> None:
    def unlike(connection: socket.socket, _body: bytes) -> None:
        connection.sendall(ok(json.dumps({"choices": [{"finish_reason": str(time.time_ns())}]}).encode()))

    with fronted(tmp_path, unlike) as (url, _, _):
        for _ in range(5):
            post(url, {"model": CHANNEL})
        rows = [row for row in httpx2.get(f"{url}/metrics").text.splitlines() if "finished_total{" in row]
        assert rows == [f'adaptory_front_finished_total{{model="{VERSION}",reason="other"}} 5.0']


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"channels": {"acme/sql@prod": {"x": 1}}}'])
def test_damaged_routes_leave_the_last_ones(tmp_path: Path, damage: bytes) -> None:
    with fronted(tmp_path, ok(b"{}")) as (url, _, _):
        assert post(url, {"model": CHANNEL}).status_code == 200
        (tmp_path / "routes.json").write_bytes(damage)
        assert post(url, {"model": CHANNEL}).status_code == 200
        (tmp_path / "routes.json").unlink()
        (tmp_path / "routes.json").mkdir()
        assert post(url, {"model": CHANNEL}).status_code == 200


def test_a_watched_directory_is_not_an_address_of_requests(tmp_path: Path) -> None:
    with scripted({PATH: ok(b"{}")}) as server:
        kept = MirrorDirectory(tmp_path)
        kept.write_routes(
            Routes({CHANNEL: {VERSION: 100}}, {CHANNEL: SINCE}, {VERSION: "a" * 40}, {VERSION: ("/a/b",)})
        )
        with listening(Front(kept, [server.url]).app()) as url:
            assert post(url, {"model": CHANNEL}).status_code == 200
