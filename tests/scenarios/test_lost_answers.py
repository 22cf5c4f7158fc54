"""Answers that never arrive: completed work is recognized, done once, and nobody else's change is undone."""

import json
import re
import shutil
from collections.abc import Callable, Generator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx2
import pytest

from registry.client import retries
from tests import services
from tests.doses import further
from tests.scenarios.test_signatures import Keys
from tests.scenarios.world import Cli, Ran, World

PUBLISH, PROMOTE = r"POST .*/releases", r"PUT .*/channels/prod"
Request = tuple[str, str, dict[str, str], bytes]
"""Command, path, headers, body."""
LEFT_OUT = {"connection", "content-length", "transfer-encoding", "date", "server"}


@dataclass
class Network:
    """A proxy in front of a registry that lies: the next `times` matching requests get `answer`, or no answer at all.
    `reaches` tells whether the registry receives them; `meanwhile` is called then, before the client notices a failure.
    """

    target: str
    matching: str = "nothing"
    times: int = 0
    reaches: bool = True
    answer: tuple[int, dict[str, str]] | None = None
    body: bytes = b"busy"
    meanwhile: Callable[[], object] | None = None
    last: Request = ("", "", {}, b"")
    """The matching requests."""

    def loses(self, matching: str, times: int = 1, **other: Any) -> None:
        self.matching, self.times = matching, times
        self.reaches, self.answer, self.body, self.meanwhile = True, None, b"busy", None
        for name, value in other.items():
            setattr(self, name, value)

    def hit(self, request: str) -> bool:
        if self.times and re.fullmatch(self.matching, request):
            self.times -= 1
            return True
        return False

    def again(self, key: str | None = None, **other: Any) -> httpx2.Response:
        """The last request that matched, or one with another body or key: it has been on its way until now."""
        command, path, headers, body = self.last
        headers = {name: value for name, value in headers.items() if key is None or name.lower() != "idempotency-key"}
        if key is not None:
            headers["Idempotency-Key"] = key
        return self.forward((command, path, headers, json.dumps({**json.loads(body), **other}).encode()))

    def hear(self, handler: BaseHTTPRequestHandler) -> Request:
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        headers = {name: value for name, value in handler.headers.items() if name.lower() not in LEFT_OUT | {"host"}}
        return handler.command, handler.path, headers, body

    def forward(self, request: Request) -> httpx2.Response:
        command, path, headers, body = request
        return httpx2.request(command, f"{self.target}{path}", content=body, headers=headers)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    monkeypatch.setattr(retries, "PAUSES_S", (0.05, 0.1, 0.2, 0.4))


@pytest.fixture
def network(stocked: Cli, somebody: Cli) -> Generator[Network]:
    """In front of the server of `stocked`, used by its command line from now on."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_arguments: object) -> None:
            """Quiet."""

        def do_GET(self) -> None:
            request, hit = network.hear(self), network.hit(f"{self.command} {self.path}")
            if hit:
                network.last = request
            answer = network.forward(request) if not hit or network.reaches else httpx2.Response(500)
            status, headers, body = answer.status_code, dict(answer.headers), answer.content
            if hit and network.meanwhile:
                network.meanwhile()
            if hit:
                if network.answer is None:
                    return  # HTTP/1.0: the connection ends without a word
                (status, headers), body = network.answer, network.body
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() not in LEFT_OUT:
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_PUT = do_GET  # noqa: N815

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    network = Network(somebody.environment["ADAPTORY_URL"])
    stocked.environment["ADAPTORY_URL"] = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield network
    server.shutdown()
    server.server_close()


@pytest.fixture
def somebody(stocked: Cli) -> Cli:
    """Another user, with an intact network."""
    return Cli(dict(stocked.environment))


Push = Callable[..., Ran]


@pytest.fixture
def push(somebody: Cli, network: Network, stocked: Cli, world: World, tmp_path: Path) -> Push:
    """Pushes the adapter with a README of this text."""
    adapter = shutil.copytree(world.adapters["sql"], tmp_path / "adapter")

    def push(text: str, target: str, *arguments: object, by: Cli = stocked) -> Ran:
        (adapter / "README.md").write_text(text)
        return by("push", adapter, target, *arguments, "--base", "tiny")

    assert push("first", "acme/sql:1.0.0", "--channel", "prod").code == 0
    return push


served = pytest.mark.parametrize("stocked", services.PAIRINGS, indirect=True)
remote = pytest.mark.parametrize("stocked", services.PAIRINGS[:1], indirect=True)
AUTO = ("acme/sql", "--bump", "auto")


def versions(cli: Cli) -> list[str]:
    return [row["version"] for row in cli.json("log", "acme/sql")["items"]]


def moves(cli: Cli) -> list[tuple[str, str]]:
    """The newest first."""
    return [(row["kind"], row["to_version"]) for row in cli.json("history", "acme/sql@prod")["items"]]


@pytest.mark.long
@served
def test_files_are_published_once_although_others_publish_before_the_answer_is_missed(
    network: Network, push: Push, somebody: Cli
) -> None:
    network.loses(PUBLISH, meanwhile=lambda: push("another", "acme/sql", "--bump", "minor", by=somebody))
    pushed = push("mine", *AUTO)
    assert (pushed.code, pushed.out[:25]) == (0, "published acme/sql:1.0.1 "), pushed
    assert versions(somebody) == ["1.1.0", "1.0.1", "1.0.0"]
    network.loses(PUBLISH, meanwhile=lambda: somebody.ok("yank", "acme/sql:1.1.1", "--reason", "wrong"))
    yanked = push("mine again", *AUTO)
    assert (yanked.code, yanked.out[:25]) == (0, "published acme/sql:1.1.1 "), yanked
    assert "warning: it is yanked: wrong." in yanked.err
    assert versions(somebody)[0] == "1.1.1"


@served
def test_a_bump_that_arrives_after_it_was_repeated_gets_no_number_of_its_own(
    network: Network, push: Push, somebody: Cli, stocked: Cli
) -> None:
    """The first request is still under way when the client gives up; somebody else publishes before it arrives."""
    network.loses(PUBLISH, reaches=False)
    assert push("mine", *AUTO).out.startswith("published acme/sql:1.0.1 ")
    assert push("another", *AUTO, by=somebody).out.startswith("published acme/sql:1.0.2 ")
    late = network.again()
    assert (late.status_code, late.json()["release"]["version"], late.json()["created"]) == (201, "1.0.1", True)
    assert versions(somebody) == ["1.0.2", "1.0.1", "1.0.0"]


@remote
@pytest.mark.parametrize("reaches", [True, *further(False)])
def test_a_bump_whose_request_or_answer_was_lost_gets_one_number(network: Network, push: Push, reaches: bool) -> None:
    network.loses(PUBLISH, reaches=reaches)
    pushed = push("mine", *AUTO, "--json").json
    assert (pushed["release"]["version"], pushed["created"]) == ("1.0.1", True)
    network.loses(PUBLISH, reaches=reaches)
    again = push("mine", *AUTO).out
    assert again.startswith("already published, nothing to do: acme/sql:1.0.1 ")
    assert push("second", *AUTO).code == push("mine", *AUTO).code == 0
    network.loses(PUBLISH, reaches=reaches)
    assert push("second", *AUTO).out.startswith("published acme/sql:1.0.4 ")  # not 1.0.2, of the same files


@pytest.mark.long
@remote
def test_a_push_without_any_answer_says_that_it_may_be_out_and_how_to_see(
    network: Network, push: Push, somebody: Cli
) -> None:
    for loses in ({}, {"reaches": False, "answer": (502, {})}):
        network.loses(PUBLISH, times=99, **loses)
        lost = push("mine", "acme/sql:2.0.0")
        assert (lost.code, "The answer was lost: the request may have taken effect" in lost.err) == (7, True), lost.err
        assert "`adaptory log acme/sql`" in lost.err
    network.loses(PUBLISH, times=0)
    assert push("mine", "acme/sql:2.0.0").out.startswith("already published, nothing to do: acme/sql:2.0.0 ")


@remote
def test_an_answer_that_says_no_was_not_lost(network: Network, push: Push) -> None:
    answer = 503, {"Content-Type": "application/problem+json"}
    problem = {"code": "database_unavailable", "detail": "The database is away.", "next": "Try again."}
    network.loses(PUBLISH, times=99, reaches=False, answer=answer, body=json.dumps(problem).encode())
    refused = push("first", "acme/sql:1.0.0")
    assert (refused.code, "The answer was lost" in refused.err, "The database is away" in refused.err) == (
        7,
        False,
        True,
    )


@served
def test_a_key_stands_for_one_request(network: Network, push: Push, world: World) -> None:
    network.loses(PUBLISH)
    assert push("mine", *AUTO).code == 0
    for other in (
        {"version": "3.0.0", "bump": None},
        {"notes": "x"},
        {"files": json.loads(network.last[3])["files"][1:]},
    ):
        reused = network.again(**other)
        assert (reused.status_code, reused.json()["code"]) == (409, "key_reused"), reused.text
    network.loses(PROMOTE)
    assert push("mine", "acme/sql:1.0.1", "--channel", "prod").code == 0
    reused = network.again(version="1.0.0")
    assert (reused.status_code, reused.json()["code"]) == (409, "key_reused"), reused.text
    for key in ("", "a b", "x" * 65, "x\ty"):
        refused = network.again(key=key)
        assert refused.status_code == 422, refused.text


@served
@pytest.mark.parametrize("way", ["push", *further("promote")])
def test_a_rollback_before_the_answer_to_a_move_is_missed_stays(
    network: Network, push: Push, somebody: Cli, stocked: Cli, way: str
) -> None:
    network.loses(PROMOTE, meanwhile=lambda: somebody.ok("rollback", "acme/sql@prod", "--reason", "incident"))
    if way == "push":
        moved = push("mine", *AUTO, "--channel", "prod")
    else:
        assert push("mine", *AUTO).code == 0
        moved = stocked("promote", "acme/sql:1.0.1", "--to", "prod")
    assert moved.code == 0, moved.err
    assert "acme/sql@prod: 1.0.0 -> 1.0.1 (promote, move " in moved.out
    assert "by others since: it is at 1.0.0" in moved.err
    assert moves(somebody) == [("rollback", "1.0.0"), ("promote", "1.0.1"), ("promote", "1.0.0")]


@pytest.mark.long
@served
@pytest.mark.parametrize("reaches", [True, False])
def test_a_rollback_whose_request_or_answer_was_lost_goes_back_once(
    network: Network, push: Push, stocked: Cli, reaches: bool
) -> None:
    for text in ("second", "third"):
        assert push(text, *AUTO, "--channel", "prod").code == 0
    network.loses("POST .*/rollback", reaches=reaches)
    back = stocked("rollback", "acme/sql@prod", "--reason", "incident")
    assert (back.code, without_registry(back.err)) == (0, ""), back.err
    assert moves(stocked)[:2] == [("rollback", "1.0.1"), ("promote", "1.0.2")]


@pytest.mark.long
@served
def test_what_a_request_found_done_already_is_its_answer_too(network: Network, push: Push, somebody: Cli) -> None:
    """The request itself moved or published nothing, and repeating it later would undo changes that others made
    meanwhile."""
    assert push("mine", *AUTO, "--channel", "prod").code == 0
    network.loses(PROMOTE, meanwhile=lambda: somebody.ok("rollback", "acme/sql@prod", "--reason", "incident"))
    again = push("mine", "acme/sql:1.0.1", "--channel", "prod")
    assert "by others since: it is at 1.0.0" in again.err
    assert moves(somebody)[0] == ("rollback", "1.0.0")
    network.loses(PUBLISH, meanwhile=lambda: push("another", *AUTO, by=somebody))
    again = push("mine", *AUTO)
    assert again.out.startswith("already published, nothing to do: acme/sql:1.0.1 "), again
    assert versions(somebody) == ["1.0.2", "1.0.1", "1.0.0"]


@served
def test_a_request_that_comes_again_is_answered_though_it_would_be_refused_by_now(
    network: Network, push: Push, somebody: Cli, tmp_path: Path
) -> None:
    network.loses(PUBLISH)
    assert push("mine", *AUTO).code == 0
    keys = Keys(tmp_path, "team")
    somebody.ok("namespace", "set", "acme", "--require-signature", "--signing-key", keys.public)
    again = network.again()
    assert (again.status_code, again.json()["release"]["version"], again.json()["created"]) == (201, "1.0.1", True)
    other = network.again(key="another", notes="x", version="5.0.0", bump=None)
    assert (other.status_code, other.json()["code"]) == (422, "unsigned"), other.text


@remote
@pytest.mark.parametrize("reaches", [True, *further(False)])
def test_a_move_whose_request_or_answer_was_lost_is_made_once(
    network: Network, push: Push, somebody: Cli, reaches: bool
) -> None:
    """Also if the abandoned request arrives after others continued: moving there again would undo their work."""
    for channel, before in (("prod", [("promote", "1.0.0")]), ("beta", [])):
        network.loses(rf"PUT .*/channels/{channel}", reaches=reaches)
        pushed = push("mine", "acme/sql:1.0.1", "--channel", channel, "--new-channel")
        said = "" if before else "creates channel beta; channels here: prod"
        assert (pushed.code, without_registry(pushed.err).strip()) == (0, said), pushed.err
        somebody.ok("promote", "acme/sql:1.0.0", "--to", channel)
        late = network.again()
        assert (late.status_code, late.json()["to_version"]) == (200, "1.0.1"), late.text
        history = somebody.json("history", f"acme/sql@{channel}")["items"]
        after = [("promote", "1.0.0"), ("promote", "1.0.1")]
        assert [(row["kind"], row["to_version"]) for row in history] == [*after, *before]


@remote
def test_a_promotion_without_an_answer_says_that_it_may_have_been_done(
    network: Network, push: Push, stocked: Cli
) -> None:
    assert push("second", "acme/sql:1.1.0").code == 0
    network.loses(PROMOTE, times=99)
    lost = stocked("promote", "acme/sql:1.1.0", "--to", "prod")
    assert (lost.code, "Check with `adaptory history acme/sql@prod`" in lost.err) == (7, True), lost.err
    assert moves(stocked) == [("promote", "1.1.0"), ("promote", "1.0.0")]


@remote
@pytest.mark.parametrize(
    ("retry_after", "wait"),
    [
        ("7", r"Wait 7 s"),
        ("Tue, 31 Dec 2999 07:28:00 GMT", r"Wait \d{2}(,\d{3}){3} s"),
        ("Wed, 21 Oct 2015 07:28:00 GMT", "Wait 1 s"),
        ("soon", None),
    ],
)
def test_the_time_to_wait_is_shown_in_seconds_whatever_server_sends_it(
    network: Network, stocked: Cli, retry_after: str, wait: str | None
) -> None:
    problem = {"code": "too_many", "detail": "Too many.", "next": "Wait as long as Retry-After says."}
    for kind, body, otherwise in (
        ("application/problem+json", json.dumps(problem).encode(), "Wait a while"),
        ("text/html", b"busy", "Look at the log of the server"),
    ):
        network.loses(".*", reaches=False, answer=(429, {"Content-Type": kind, "Retry-After": retry_after}), body=body)
        refused = stocked("list")
        assert refused.code == 7
        assert re.search(wait or otherwise, refused.err), refused.err


def without_registry(text: str) -> str:
    """The message without the name of the registry that a change goes to."""
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith("registry: "))
