"""Limits for one caller: headers, bodies, requests, concurrent uploads."""

import socket
import threading
import time
import tracemalloc
import zlib
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx2
import pytest

from registry.api.app import create_app
from registry.api.http import request as bodies
from registry.api.http.threads import UPLOAD_THREADS
from registry.client.inprocess import InProcessTransport
from registry.domain.access import namespaces, tokens
from registry.domain.access.roles import Role
from registry.environment.settings import Settings
from registry.transfer.resources import open_resources
from tests import services
from tests.access.house import HOST, House, entered, new_house
from tests.eventually import eventually
from tests.scenarios.world import server

BASE = {"name": "x", "model_type": "llama", "tied": False, "weights_digest": "0" * 64}


@pytest.fixture(scope="module")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> Generator[House]:
    """A registry on a directory store: bytes sent to S3 do not pass the server, and the limits concern the server
    alone."""
    house = new_house(services.PAIRINGS[0], tmp_path_factory.mktemp("house"))
    yield house
    house.close()


def limited(furnished: House, **limits: object) -> House:
    """The same registry behind a server with these limits."""
    return entered(furnished, furnished.environ, **limits)


def test_headers_that_are_too_long_are_answered_431(furnished: House) -> None:
    house = limited(furnished, max_header_bytes=4000)
    assert house.ask("reader", "GET", "/v1/whoami", headers={"X-Long": "x" * 1000}).status_code == 200
    answer = house.ask("reader", "GET", "/v1/whoami", headers={"X-Long": "x" * 5000})
    assert (answer.status_code, answer.json()["code"]) == (431, "headers_too_large")
    assert house.ask("reader", "GET", "/v1/adapters?cursor=" + "x" * 5000).status_code == 431
    house.close()


def test_a_document_that_is_too_long_is_answered_413_before_it_is_read(furnished: House) -> None:
    house = limited(furnished, max_document_bytes=1000)
    answer = house.ask("publisher", "POST", "/v1/suites", content=b"x" * 2000)
    assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")
    assert "raise ADAPTORY_MAX_DOCUMENT_BYTES on the server" in answer.json()["next"]
    answer = house.ask("publisher", "POST", "/v1/suites", headers={"Content-Length": str(2**60)}, content=iter([b"{}"]))
    assert answer.status_code == 413
    house.close()


@pytest.mark.parametrize(
    ("limit", "status", "code"),
    [
        ({"max_header_bytes": 4000}, 431, "headers_too_large"),
        ({"max_document_bytes": 1000}, 413, "body_too_large"),
        ({"rate_limit": "1/minute"}, 429, "too_many_requests"),
    ],
)
def test_a_browser_gets_a_page_when_it_asks_for_too_much(
    furnished: House, limit: dict[str, object], status: int, code: str
) -> None:
    house, html = limited(furnished, **limit), {"Accept": "text/html,*/*;q=0.8"}
    house.ask("nobody", "GET", "/login", headers=html)
    large: dict[str, object] = {"headers": {**html, "X-Long": "x" * 5000}, "content": b"x" * 2000}
    answer = house.ask("nobody", "POST", "/login", **large)
    assert (answer.status_code, answer.headers["content-type"]) == (status, "text/html; charset=utf-8")
    assert f"<code>{code}</code>" in answer.text or f">{code}<" in answer.text
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["cache-control"] == "private, no-store"
    assert ("retry-after" in answer.headers) == (status == 429)
    for path, accept in (("/v1/suites", "text/html"), ("/login", "application/json")):
        again = house.ask("nobody", "POST", path, **{**large, "headers": {"Accept": accept, "X-Long": "x" * 5000}})
        assert (again.status_code, again.json()["code"]) == (status, code)
    house.close()


def test_a_path_that_does_not_exist_is_a_page_for_a_browser(furnished: House) -> None:
    for accept, kind in (("text/html", "text/html; charset=utf-8"), ("*/*", "application/problem+json")):
        answer = furnished.ask("nobody", "GET", "/a/b/c/d/e/f", headers={"Accept": accept})
        assert (answer.status_code, answer.headers["content-type"]) == (404, kind)


def test_a_document_is_read_only_of_those_who_may_send_it(furnished: House) -> None:
    for caller, status in {"nobody": 401, "reader": 403, "publisher": 422}.items():
        assert furnished.ask(caller, "POST", "/v1/suites", content=b"[").status_code == status, caller


def test_who_has_no_role_sends_short_documents_where_the_route_decides(furnished: House) -> None:
    for caller, refused in {"nobody": True, "reader": False}.items():
        answer = furnished.ask(caller, "POST", "/v1/compositions", json={"recipe": "x" * 70_000})
        assert (answer.status_code == 413) == refused, answer.text
        chunked = furnished.ask(caller, "POST", "/v1/compositions", content=iter([b"{}"]))
        assert (chunked.json()["code"] == "length_missing") == refused, chunked.text


def test_a_document_of_very_many_values_is_not_made_into_objects(furnished: House) -> None:
    house = limited(furnished, max_document_bytes=16_000)
    for count, status in {990: 422, 1010: 413}.items():
        body = b'{"namespace": "acme", "files": [' + b"[]," * (count // 2) + b"[]]}"
        answer = house.ask("publisher", "POST", "/v1/uploads", content=body)
        assert (answer.status_code, "1,000 commas" in answer.text) == (status, status == 413), answer.text
    house.close()


@pytest.mark.parametrize(
    ("path", "body"),
    {
        "fields that there are not": ("/v1/uploads", {str(number): 0 for number in range(100_000)}),
        "rows without what they need": ("/v1/bases", BASE | {"tensors": [{}] * 100_000}),
        "settings that are not values": (
            "/v1/adapters/acme/sql/releases",
            {"base": "tiny", "files": [], "provenance": {"hyperparameters": {"a": [[]] * 100_000}}},
        ),
    }.values(),
)
def test_what_is_wrong_very_often_is_one_error(furnished: House, path: str, body: dict[str, object]) -> None:
    tracemalloc.start()
    answer = furnished.ask("admin", "POST", path, json=body)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert answer.status_code == 422, answer.text
    assert most < 60e6, "an error takes some 500 bytes"


def test_a_document_that_does_not_end_is_waited_for_so_long(furnished: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("registry.api.http.request.DOCUMENT_S", 0.2)
    go_on = threading.Event()

    def slowly() -> Iterator[bytes]:
        yield b"{"
        go_on.wait(2)
        yield b"}"

    answer = furnished.ask("publisher", "POST", "/v1/suites", content=slowly())
    go_on.set()
    assert (answer.status_code, answer.json()["code"]) == (400, "body_slow")


def test_a_token_that_asks_too_often_learns_when_to_come_back_and_others_are_not_held_up(furnished: House) -> None:
    house = limited(furnished, rate_limit="5/minute")
    assert [house.ask("reader", "GET", "/v1/whoami").status_code for _ in range(5)] == [200] * 5
    answer = house.ask("reader", "GET", "/v1/whoami")
    assert (answer.status_code, answer.json()["code"]) == (429, "too_many_requests")
    assert 1 <= int(answer.headers["Retry-After"]) <= 60
    assert house.ask("publisher", "GET", "/v1/whoami").status_code == 200
    assert house.ask("nobody", "GET", "/v1/whoami").status_code == 200
    house.close()


@pytest.mark.parametrize("probe", ["/healthz", "/readyz"])
def test_probes_are_answered_however_many_there_are_and_whatever_else_came_from_their_address(
    furnished: House, probe: str
) -> None:
    house = limited(furnished, rate_limit="2/minute")
    assert [status for _, status in guess(house, 4)] == [401, 401, 429, 429]
    assert all(house.ask("nobody", "GET", probe).status_code == 200 for _ in range(10))
    house.close()


def test_a_token_that_does_not_exist_is_counted_too(furnished: House) -> None:
    house = limited(furnished, rate_limit="3/minute")
    house.secrets["guess"] = "adp_aaaaaaaaaaaa_" + "0" * 72
    codes = [house.ask("guess", "GET", "/v1/whoami").status_code for _ in range(5)]
    assert codes == [401, 401, 401, 429, 429]
    house.close()


def test_uploads_at_a_time_are_limited_by_user_and_free_again_when_they_end(furnished: House) -> None:
    house = limited(furnished, max_concurrent_uploads=1)
    things = house.things["acme"]
    path = f"/v1/blobs/{things.announced}?upload={things.upload_id}"
    began, go_on = threading.Event(), threading.Event()

    def slowly() -> Iterator[bytes]:
        yield b"acm"
        began.set()
        go_on.wait(20)
        yield b"e!"

    answers: list[httpx2.Response] = []

    def send() -> None:
        answers.append(house.ask("publisher", "PUT", path, content=slowly(), headers={"Content-Length": "5"}))

    thread = threading.Thread(target=send)
    thread.start()
    assert began.wait(20)
    refused = house.ask("publisher", "PUT", path, content=b"acme!")
    assert (refused.status_code, refused.json()["code"]) == (429, "too_many_uploads")
    assert refused.json()["subject"] == "publisher"
    assert int(refused.headers["Retry-After"]) >= 1
    assert house.ask("admin", "PUT", path, content=b"acme!").status_code == 201
    go_on.set()
    thread.join(20)
    assert [answer.status_code for answer in answers] == [201]
    assert house.ask("publisher", "PUT", path, content=b"acme!").status_code == 201
    house.close()


def test_another_token_does_not_let_a_user_send_more_at_a_time(furnished: House) -> None:
    house = limited(furnished, max_concurrent_uploads=1)
    house.secrets["again"] = house.ask("publisher", "POST", "/v1/tokens", json={"name": "again"}).json()["token"]
    things, began, go_on = house.things["acme"], threading.Event(), threading.Event()
    path = f"/v1/blobs/{things.announced}?upload={things.upload_id}"

    def slowly() -> Iterator[bytes]:
        yield b"acm"
        began.set()
        go_on.wait(20)
        yield b"e!"

    headers = {"Content-Length": "5"}
    thread = threading.Thread(target=lambda: house.ask("publisher", "PUT", path, content=slowly(), headers=headers))
    thread.start()
    assert began.wait(20)
    refused = house.ask("again", "PUT", path, content=b"acme!")
    assert (refused.status_code, refused.json()["code"]) == (429, "too_many_uploads")
    go_on.set()
    thread.join(20)
    assert house.ask("again", "PUT", path, content=b"acme!").status_code == 201
    house.close()


def test_a_body_that_trickles_is_ended(furnished: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "BODY_SILENCE_S", 0.3)
    things = furnished.things["acme"]
    path = f"/v1/blobs/{things.announced}?upload={things.upload_id}"

    def trickle() -> Iterator[bytes]:
        for byte in b"acme!":
            time.sleep(0.1)
            yield bytes([byte])

    answer = furnished.ask("publisher", "PUT", path, content=trickle(), headers={"Content-Length": "5"})
    assert (answer.status_code, answer.json()["code"]) == (400, "body_slow")
    assert furnished.ask("publisher", "PUT", path, content=b"acme!").status_code == 201


def test_the_limits_stay_out_of_the_way_of_the_single_user(tmp_path: Path) -> None:
    """Nobody else shares the registry in a home."""
    resources = open_resources(Settings(home=tmp_path, rate_limit="1/minute"))
    transport = InProcessTransport(create_app(resources))
    with httpx2.Client(base_url="http://localhost", transport=transport) as http:
        assert [http.get("/v1/whoami").status_code for _ in range(5)] == [200] * 5
    resources.close()


def test_a_token_is_one_caller_however_the_header_is_spelled(furnished: House) -> None:
    house = limited(furnished, rate_limit="4/minute")
    secret = house.secrets["reader"]
    spellings = [f"Bearer {secret}", f"bearer {secret}", f"BEARER  {secret}", f"Bearer {secret} "] * 2
    codes = [
        house.ask("nobody", "GET", "/v1/whoami", headers={"Authorization": spelling}).status_code
        for spelling in spellings
    ]
    assert codes == [200] * 4 + [429] * 4
    house.close()


def guess(house: House, times: int, method: str = "GET", path: str = "/v1/whoami") -> list[tuple[httpx2.Response, int]]:
    """The statuses of answers to many well-formed but invalid tokens."""
    answers: list[tuple[httpx2.Response, int]] = []
    for number in range(times):
        body = f"adp_{'a' * 12}_{number:064x}"
        house.secrets["guess"] = f"{body}{zlib.crc32(body.encode()):08x}"
        answer = house.ask("guess", method, path)
        answers.append((answer, answer.status_code))
    return answers


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/v1/whoami"), ("POST", "/v1/uploads"), ("PUT", f"/v1/blobs/{'0' * 64}?upload=x")]
)
def test_guessed_tokens_are_counted_by_address_whatever_they_are_sent_with(
    furnished: House, method: str, path: str
) -> None:
    house = limited(furnished, rate_limit="5/minute")
    answers = guess(house, 8, method, path)
    assert [status for _, status in answers] == [401] * 5 + [429] * 3
    assert "invalid tokens" in answers[-1][0].json()["detail"]
    house.close()


def test_too_many_guesses_get_a_time_to_wait_and_guessing_is_allowed_again_then(furnished: House) -> None:
    house = limited(furnished, rate_limit="3/3seconds")
    answers = guess(house, 5)
    assert [status for _, status in answers] == [401, 401, 401, 429, 429]
    wait_s = int(answers[-1][0].headers["Retry-After"])
    assert 1 <= wait_s <= 3
    time.sleep(wait_s)
    assert [status for _, status in guess(house, 1)] == [401]
    house.close()
    house = limited(furnished, rate_limit="3/hour")
    assert int(guess(house, 5)[-1][0].headers["Retry-After"]) > 60
    house.close()


@pytest.mark.parametrize("cache_s", [0, 60])
def test_who_has_a_token_is_not_refused_for_what_others_of_the_same_address_guess(
    furnished: House, cache_s: int
) -> None:
    house = limited(furnished, rate_limit="4/minute", access_cache_s=cache_s)
    assert guess(house, 6)[-1][1] == 429
    assert [house.ask("reader", "GET", "/v1/whoami").status_code for _ in range(6)] == [200] * 4 + [429] * 2
    assert house.ask("publisher", "POST", "/v1/uploads", json={"namespace": "acme", "files": []}).status_code != 429
    assert house.ask("nobody", "GET", "/v1/whoami").status_code == 200, "who sends no token guesses nothing"
    for spent in ("revoked", "expired"):
        assert house.ask(spent, "GET", "/v1/whoami").status_code == 429
    assert guess(house, 1)[0][1] == 429
    house.close()


def test_a_guess_costs_no_reading_of_its_body(furnished: House) -> None:
    house = limited(furnished, rate_limit="2/minute")
    read: list[bytes] = []

    def body() -> Iterator[bytes]:
        read.append(b"[]")
        yield b"[]"

    guess(house, 1)
    assert (house.ask("guess", "POST", "/v1/suites", content=body()).status_code, read) == (401, [])
    assert (house.ask("guess", "POST", "/v1/suites", content=body()).status_code, read) == (429, [])
    house.close()


def test_asking_without_a_token_is_no_guess(furnished: House) -> None:
    house = limited(furnished, rate_limit="3/minute")
    assert [house.ask("nobody", "GET", "/v1/jobs").status_code for _ in range(4)] == [401] * 3 + [429]
    assert guess(house, 1)[0][1] == 401
    house.close()


@pytest.mark.long
def test_bodies_that_stall_hold_up_no_one_else(furnished: House) -> None:
    house = limited(furnished, max_concurrent_uploads=1000)
    things, go_on = house.things["acme"], threading.Event()
    path = f"/v1/blobs/{things.announced}?upload={things.upload_id}"

    def stall() -> Iterator[bytes]:
        yield b"a"
        go_on.wait(30)
        yield b"cme!"

    def send() -> None:
        house.ask("publisher", "PUT", path, content=stall(), headers={"Content-Length": "5"})

    senders = [threading.Thread(target=send) for _ in range(UPLOAD_THREADS - 1)]
    for sender in senders:
        sender.start()
    try:
        for _ in range(3):
            assert house.ask("reader", "GET", "/v1/adapters").status_code == 200
            assert house.ask("nobody", "GET", "/readyz").status_code == 200
    finally:
        go_on.set()
        for sender in senders:
            sender.join(30)
    house.close()


def test_slow_uploads_of_three_users_do_not_hold_up_the_push_of_another(tmp_path: Path) -> None:
    """And when none is free for a user, the next upload gets 503 and the time to wait, not silence."""
    house = new_house(services.PAIRINGS[0], tmp_path / "home")
    things = house.things["acme"]
    path = f"/v1/blobs/{things.announced}?upload={things.upload_id}"
    for name in ("ann", "ben", "cal"):
        with house.resources.write() as session:
            namespaces.set_member(session, HOST, "acme", name, Role.PUBLISHER)
            made = tokens.create(session, HOST, tokens.NewToken(name, name, {"acme": Role.PUBLISHER}, None))
            house.secrets[name] = made[1]
    given = {"ADAPTORY_ACCESS": "tokens", "ADAPTORY_RATE_LIMIT": "", "ADAPTORY_MAX_CONCURRENT_UPLOADS": "64"}
    with server(tmp_path / "home", **given) as (url, _), ExitStack() as slow:
        address = httpx2.URL(url)

        def stall(user: str, count: int) -> None:
            head = f"PUT {path} HTTP/1.1\r\nHost: {address.host}\r\nAuthorization: Bearer {house.secrets[user]}\r\n"
            for _ in range(count):
                sender = slow.enter_context(socket.create_connection((address.host, address.port)))
                sender.sendall(f"{head}Content-Length: 5\r\n\r\na".encode())

        def send(user: str) -> httpx2.Response:
            headers = {"Authorization": f"Bearer {house.secrets[user]}"}
            return httpx2.put(f"{url}{path}", content=b"acme!", headers=headers, timeout=10)

        for user in ("ann", "ben", "cal"):
            stall(user, 16)
        time.sleep(3)
        began = time.monotonic()
        assert send("publisher").status_code == 201
        assert time.monotonic() - began < 5

        def full() -> bool:
            """Whether ann has reached the number left for others: the last of her uploads may have met this one."""
            if send("ann").status_code == 503:
                return True
            stall("ann", 1)
            return False

        stall("ann", 32)
        eventually(full, within_s=45, every_s=0.5)
        refused = send("ann")
        assert refused.json()["code"] == "uploads_busy"
        assert int(refused.headers["Retry-After"]) >= 1
        assert send("publisher").status_code == 201, "another user goes on"
        slow.close()
        eventually(lambda: send("ann").status_code == 201, within_s=45, every_s=0.5)
    house.close()
