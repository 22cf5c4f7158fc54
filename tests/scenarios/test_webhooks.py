"""Webhooks as an admin uses them: events reach a real receiver, signed, in order and at least once."""

import base64
import hashlib
import hmac
import json
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from registry.transfer.resources import Resources
from registry.worker.deliverer import Deliverer
from tests.scenarios.traces import opened
from tests.scenarios.world import Cli

LOCAL = {"ADAPTORY_WEBHOOK_NETWORKS": "127.0.0.0/8"}


@dataclass(frozen=True)
class Received:
    """A request that the receiver got."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def event(self) -> Any:
        return json.loads(self.body)

    def is_signed_by(self, secret: str) -> bool:
        """Verifies as a receiver does that follows the text of Standard Webhooks, with code of its own."""
        signed = b".".join([self.headers["webhook-id"].encode(), self.headers["webhook-timestamp"].encode(), self.body])
        key = base64.b64decode(secret.split("_", 1)[1])
        expected = "v1," + base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()
        return any(hmac.compare_digest(expected, one) for one in self.headers["webhook-signature"].split(" "))


@dataclass
class Receiver:
    """A server that keeps what it gets. `answers` are the statuses of its next answers, then 204."""

    url: str
    got: list[Received] = field(default_factory=list[Received])
    answers: list[int] = field(default_factory=list[int])


@contextmanager
def receiving() -> Generator[Receiver]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            receiver.got.append(Received(self.path, {k.lower(): v for k, v in self.headers.items()}, body))
            self.send_response(receiver.answers.pop(0) if receiver.answers else 204)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    receiver = Receiver(f"http://127.0.0.1:{server.server_port}/hook")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield receiver
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def receiver() -> Generator[Receiver]:
    with receiving() as running:
        yield running


@pytest.fixture
def cli(small_team: Cli) -> Cli:
    """A registry whose operator lets webhooks reach this machine."""
    return replace(small_team, environment=small_team.environment | LOCAL)


@pytest.fixture
def resources(cli: Cli) -> Generator[Resources]:
    held = opened(cli)
    yield held
    held.close()


def deliver_due(resources: Resources) -> int:
    """Delivers until nothing is due, as a worker does but in this thread, and returns the number of attempts."""
    deliverer, count = Deliverer(resources), 0
    while claimed := deliverer.claim():
        for sent in claimed:
            deliverer.deliver(sent)
            count += 1
    return count


def test_a_promotion_reaches_the_receiver_signed_and_the_admin_sees_the_delivery(
    cli: Cli, resources: Resources, receiver: Receiver
) -> None:
    added = cli.json("webhook", "add", receiver.url, "--namespace", "acme", "--event", "channel.moved")
    cli.ok("promote", "acme/sql:1.0.0", "--to", "canary", "--new-channel", "--reason", "try it")
    assert deliver_due(resources) == 1
    [request] = receiver.got
    assert request.is_signed_by(added["secret"])
    assert request.headers["content-type"].startswith("application/cloudevents+json")
    event = request.event
    assert (event["specversion"], event["type"], event["subject"]) == (
        "1.0",
        "adaptory.channel.moved",
        "acme/sql@canary",
    )
    assert event["data"]["after"]["version"] == "1.0.0"
    assert event["data"]["reason"] == "try it"
    [delivery] = cli.json("webhook", "deliveries", added["id"])["items"]
    assert (delivery["state"], delivery["status"], delivery["attempts"]) == ("delivered", 204, 1)
    assert delivery["message_id"] == request.headers["webhook-id"]
    listed = cli.ok("webhook", "list").out + cli.ok("webhook", "list", "--json").out + cli.ok("audit", "--json").out
    assert added["id"] in listed
    assert added["secret"] not in listed
