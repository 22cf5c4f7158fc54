"""A server whose answers a test writes byte by byte, and a front on a real port: what a double or a test client cannot
do, such as breaking HTTP or hanging up."""

import socket
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import uvicorn
from starlette.applications import Starlette

from tests import services
from tests.eventually import eventually

Answer = bytes | Callable[[socket.socket, bytes], None]
"""Bytes to send, or a function of the connection and the request's body."""


def ok(body: bytes, kind: str = "application/json") -> bytes:
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return head.encode() + body


class ScriptedServer:
    """Answers each path as its test says, and keeps the requests."""

    def __init__(self, answers: Mapping[str, Answer]) -> None:
        self.answers = dict(answers)
        self.requests: list[tuple[bytes, bytes]] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            received = b""
            while b"\r\n\r\n" not in received:
                part = connection.recv(1 << 16)
                if not part:
                    return
                received += part
            head, _, body = received.partition(b"\r\n\r\n")
            lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
            size = int(lengths[0].partition(b":")[2]) if lengths else 0
            while len(body) < size:
                body += connection.recv(1 << 16)
            self.requests.append((head, body))
            answer = self.answers.get(head.split()[1].decode(), b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            if callable(answer):
                answer(connection, body)
            else:
                connection.sendall(answer)


@contextmanager
def scripted(answers: Mapping[str, Answer]) -> Generator[ScriptedServer]:
    server = ScriptedServer(answers)
    try:
        yield server
    finally:
        server.close()


@contextmanager
def listening(app: Starlette) -> Generator[str]:
    """The app on a port, in a thread; yields its address."""
    port = services.free_port()
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="critical"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        eventually(lambda: server.started, within_s=10)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join()


def models(*rows: Any) -> bytes:
    """An answer of `/v1/models`."""
    import json

    return ok(json.dumps({"object": "list", "data": list(rows)}).encode())
