"""Answers that never arrive: what was done is found again, done once, and nobody else's change is undone."""

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

from tests import services
from tests.scenarios.world import Cli, Ran, World

PUBLISH, PROMOTE = r"POST .*/releases", r"PUT .*/channels/prod"
LEFT_OUT = {"connection", "content-length", "transfer-encoding", "date", "server"}


@dataclass
class Network:
    """Lies before a registry: of the next `times` requests that match, what `answer` gives is sent, or nothing at all.

    `reaches` says whether the registry hears of them; `meanwhile` happens then, before the client knows of a failure.
    """

    target: str
    matching: str = "nothing"
    times: int = 0
    reaches: bool = True
    answer: tuple[int, dict[str, str]] | None = None
    body: bytes = b"busy"
    meanwhile: Callable[[], object] | None = None

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

    def forward(self, handler: BaseHTTPRequestHandler) -> httpx2.Response:
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        headers = {name: value for name, value in handler.headers.items() if name.lower() not in LEFT_OUT | {"host"}}
        return httpx2.request(handler.command, f"{self.target}{handler.path}", content=body, headers=headers)


@pytest.fixture
def network(stocked: Cli) -> Generator[Network]:
    """Before the server of `stocked`, whose command line goes by it from now on."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_arguments: object) -> None:
            """Quiet."""

        def do_GET(self) -> None:
            hit = network.hit(f"{self.command} {self.path}")
            answer = network.forward(self) if not hit or network.reaches else httpx2.Response(500)
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
    network = Network(stocked.environment["ADAPTORY_URL"])
    stocked.environment["ADAPTORY_URL"] = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield network
    server.shutdown()
    server.server_close()


@pytest.fixture
def somebody(stocked: Cli) -> Cli:
    """Somebody else, whose network is sound."""
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


@served
def test_files_are_published_once_although_others_publish_before_the_answer_is_missed(
    network: Network, push: Push, somebody: Cli
) -> None:
    network.loses(PUBLISH, meanwhile=lambda: push("another", "acme/sql", "--bump", "minor", by=somebody))
    pushed = push("mine", *AUTO)
    assert (pushed.code, pushed.out[:25]) == (0, "published acme/sql:1.0.1 "), pushed
    assert "acme/sql:1.0.1 has these files and was not there before" in pushed.err
    assert versions(somebody) == ["1.1.0", "1.0.1", "1.0.0"]
    network.loses(PUBLISH, meanwhile=lambda: somebody.ok("yank", "acme/sql:1.1.1", "--reason", "wrong"))
    yanked = push("mine again", *AUTO, "--json")
    assert (yanked.code, yanked.json["release"]["version"], yanked.json["answer_lost"]) == (0, "1.1.1", True)
    assert "acme/sql:1.1.1 is yanked by now: wrong." in yanked.err
    assert versions(somebody)[0] == "1.1.1"


@remote
@pytest.mark.parametrize("reaches", [True, False])
def test_a_bump_whose_request_or_answer_was_lost_gets_one_number(network: Network, push: Push, reaches: bool) -> None:
    network.loses(PUBLISH, reaches=reaches)
    pushed = push("mine", *AUTO, "--json")
    assert (pushed.code, pushed.json["release"]["version"], pushed.json["answer_lost"]) == (0, "1.0.1", reaches)
    assert push("mine", *AUTO).out.startswith("already there, nothing to do: acme/sql:1.0.1 ")
    network.loses(PUBLISH)
    again = push("mine", *AUTO, "--json").json
    assert (again["release"]["version"], again["created"], again["answer_lost"]) == ("1.0.1", False, True)


@remote
def test_files_that_were_there_before_are_not_taken_for_what_a_lost_request_made(network: Network, push: Push) -> None:
    assert push("second", *AUTO).code == 0
    network.loses(PUBLISH, reaches=False)
    assert push("first", *AUTO).out.startswith("published acme/sql:1.0.2 ")
    network.loses(PUBLISH)
    found = push("second", *AUTO, "--json").json
    assert (found["release"]["version"], found["created"]) == ("1.0.3", True)


@remote
def test_a_push_without_any_answer_says_that_it_may_be_out_and_how_to_see(
    network: Network, push: Push, somebody: Cli
) -> None:
    network.loses(PUBLISH, times=99)
    lost = push("mine", "acme/sql:2.0.0")
    assert (lost.code, "No answer tells whether the release is out" in lost.err) == (7, True), lost.err
    assert "`adaptory log acme/sql`. To push the same again is safe" in lost.err
    network.loses(PUBLISH, times=0)
    assert push("mine", "acme/sql:2.0.0").out.startswith("already there, nothing to do: acme/sql:2.0.0 ")


@remote
def test_an_answer_that_says_no_was_not_lost(network: Network, push: Push) -> None:
    answer = 503, {"Content-Type": "application/problem+json"}
    problem = {"code": "database_unavailable", "detail": "The database is away.", "next": "Try again."}
    network.loses(PUBLISH, reaches=False, answer=answer, body=json.dumps(problem).encode())
    assert push("first", "acme/sql:1.0.0").out.startswith("already there, nothing to do: acme/sql:1.0.0 ")
    network.loses(PUBLISH, reaches=False, answer=(502, {}))
    assert push("first", "acme/sql:1.0.0").out.startswith("there, published by this push or before")


@served
def test_a_rollback_before_the_answer_to_a_move_is_missed_stays(network: Network, push: Push, somebody: Cli) -> None:
    network.loses(PROMOTE, meanwhile=lambda: somebody.ok("rollback", "acme/sql@prod", "--reason", "incident"))
    pushed = push("mine", *AUTO, "--channel", "prod")
    assert pushed.code == 0, pushed.err
    assert "acme/sql@prod: 1.0.0 -> 1.0.1 (promote, move " in pushed.out
    assert "acme/sql@prod was moved as asked, and to 1.0.0 since (rollback by " in pushed.err
    assert moves(somebody) == [("rollback", "1.0.0"), ("promote", "1.0.1"), ("promote", "1.0.0")]


@remote
@pytest.mark.parametrize("reaches", [True, False])
def test_a_move_whose_request_or_answer_was_lost_is_made_once(
    network: Network, push: Push, somebody: Cli, reaches: bool
) -> None:
    for channel, before in (("prod", [("promote", "1.0.0")]), ("beta", [])):
        network.loses(rf"PUT .*/channels/{channel}", reaches=reaches)
        pushed = push("mine", "acme/sql:1.0.1", "--channel", channel)
        assert (pushed.code, pushed.err) == (0, ""), pushed.err
        history = somebody.json("history", f"acme/sql@{channel}")["items"]
        assert [(row["kind"], row["to_version"]) for row in history] == [("promote", "1.0.1"), *before]


@remote
def test_a_move_that_was_not_made_gives_way_to_one_of_somebody_else(
    network: Network, push: Push, somebody: Cli
) -> None:
    assert push("second", "acme/sql:1.1.0").code == 0
    network.loses(PROMOTE, reaches=False, meanwhile=lambda: somebody.ok("promote", "acme/sql:1.1.0", "--to", "prod"))
    refused = push("mine", "acme/sql:1.2.0", "--channel", "prod")
    assert (refused.code, "acme/sql@prod has moved since you looked" in refused.err) == (4, True), refused.err
    assert "published acme/sql:1.2.0 " in refused.out
    assert moves(somebody)[0] == ("promote", "1.1.0")


@remote
def test_a_promotion_without_an_answer_says_that_it_may_have_been_done(
    network: Network, push: Push, stocked: Cli
) -> None:
    assert push("second", "acme/sql:1.1.0").code == 0
    network.loses(PROMOTE)
    lost = stocked("promote", "acme/sql:1.1.0", "--to", "prod")
    assert (lost.code, "Look whether it runs, and whether it was done all the same." in lost.err) == (7, True), lost.err


@remote
@pytest.mark.parametrize(
    ("told", "wait"),
    [
        ("7", r"Wait 7 s"),
        ("Tue, 31 Dec 2999 07:28:00 GMT", r"Wait \d{2}(,\d{3}){3} s"),
        ("Wed, 21 Oct 2015 07:28:00 GMT", "Wait 1 s"),
        ("soon", None),
    ],
)
def test_how_long_to_wait_is_told_in_seconds_whoever_says_it(
    network: Network, stocked: Cli, told: str, wait: str | None
) -> None:
    problem = {"code": "too_many", "detail": "Too many.", "next": "Wait as long as Retry-After says."}
    for kind, body, otherwise in (
        ("application/problem+json", json.dumps(problem).encode(), "Wait a while"),
        ("text/html", b"busy", "Look at the log of the server"),
    ):
        network.loses(".*", reaches=False, answer=(429, {"Content-Type": kind, "Retry-After": told}), body=body)
        refused = stocked("list")
        assert refused.code == 7
        assert re.search(wait or otherwise, refused.err), refused.err
