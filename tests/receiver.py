"""A receiver of webhooks: a real server that keeps what it gets, and verifies with code of its own."""

import base64
import hashlib
import hmac
import json
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from registry.transfer.resources import Resources
from registry.worker.deliverer import Deliverer

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
        return any(
            hmac.compare_digest(expected, signature) for signature in self.headers["webhook-signature"].split(" ")
        )


@dataclass
class Receiver:
    """`answers` are the statuses of its next answers, then 204; until `goes_on` is set, it does not answer."""

    url: str
    got: list[Received] = field(default_factory=list[Received])
    answers: list[int] = field(default_factory=list[int])
    goes_on: threading.Event = field(default_factory=threading.Event)

    @property
    def seen(self) -> list[tuple[str, str]]:
        """The type and the subject of each event, in the order in which they came."""
        return [(request.event["type"].removeprefix("adaptory."), request.event["subject"]) for request in self.got]


@contextmanager
def receiving() -> Generator[Receiver]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            receiver.got.append(Received(self.path, {k.lower(): v for k, v in self.headers.items()}, body))
            receiver.goes_on.wait(30)
            self.send_response(receiver.answers.pop(0) if receiver.answers else 204)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    receiver = Receiver(f"http://127.0.0.1:{server.server_port}/hook")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    receiver.goes_on.set()
    thread.start()
    try:
        yield receiver
    finally:
        receiver.goes_on.set()
        server.shutdown()
        thread.join()
        server.server_close()


def deliver_due(resources: Resources) -> int:
    """Delivers until nothing is due, as a worker does but in this thread, and returns the number of attempts."""
    deliverer, count = Deliverer(resources), 0
    while claimed := deliverer.claim():
        for sent in claimed:
            deliverer.deliver(sent)
            count += 1
    return count
