"""Servers in their own processes, and clients that cost little: the other core's time is part of a figure."""

import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, contextmanager
from itertools import count
from pathlib import Path
from tempfile import TemporaryFile

START_S = 120
Request = Callable[[int], bytes]
"""Request number -> the request's bytes."""


def get(path: str) -> Request:
    request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()
    return lambda _number: request


def send(method: str, path: str, body: Callable[[int], bytes]) -> Request:
    def request(number: int) -> bytes:
        content = body(number)
        head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content

    return request


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def process(port: int, command: Sequence[str], **environment: str) -> Generator[int]:
    """Yields the process id once the port takes connections. Raises RuntimeError when it ends or the time is up."""
    deadline = time.monotonic() + START_S
    with TemporaryFile() as log:
        server = subprocess.Popen(command, env={**os.environ, **environment}, stdout=log, stderr=log)
        try:
            while not _listens(port):
                if server.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError(f"{' '.join(command)} does not answer: {log.read()[-2000:]!r}")
                time.sleep(0.05)
            yield server.pid
        finally:
            server.terminate()
            server.wait(START_S)


def cpu_seconds(process_id: int) -> float:
    """CPU seconds of a process and its children so far: a figure that busy neighbours hardly change."""
    ticks, parents = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        number = int(path.parent.name)
        parents[number], ticks[number] = int(fields[1]), int(fields[11]) + int(fields[12])
    family = {process_id}
    while more := {number for number, parent in parents.items() if parent in family} - family:
        family |= more
    return sum(ticks.get(number, 0) for number in family) / os.sysconf("SC_CLK_TCK")


def _listens(port: int) -> bool:
    with socket.socket() as trial:
        return trial.connect_ex(("127.0.0.1", port)) == 0


class Client:
    """A minimal client: one keep-alive connection."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def close(self) -> None:
        self._socket.close()

    def call(self, request: bytes) -> bytes:
        """Returns the body of the response. Raises RuntimeError for any status except 200 and 201."""
        self._socket.sendall(request)
        answer = self._socket.recv(1 << 18)
        while b"\r\n\r\n" not in answer:
            answer += self._more()
        head, _, body = answer.partition(b"\r\n\r\n")
        marker = head.lower().index(b"content-length:") + len(b"content-length:")
        missing = int(head[marker:].split(b"\r\n", 1)[0]) - len(body)
        parts = [body]
        while missing > 0:
            parts.append(self._more())
            missing -= len(parts[-1])
        if head[9:12] not in (b"200", b"201"):
            raise RuntimeError(f"{request[:200]!r} was answered {head[:200]!r}: {parts[0][:500]!r}")
        return b"".join(parts)

    def _more(self) -> bytes:
        received = self._socket.recv(1 << 18)
        if not received:
            raise RuntimeError("the server hung up")
        return received


def requests_per_second(port: int, request: Request, clients: int, seconds: float) -> float:
    done: list[int] = []
    numbers = count()
    until = time.perf_counter() + seconds

    def work() -> None:
        finished = 0
        with closing(Client(port)) as client:
            while time.perf_counter() < until:
                client.call(request(next(numbers)))
                finished += 1
        done.append(finished)

    threads = [threading.Thread(target=work) for _ in range(clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(done) != clients:
        raise RuntimeError(f"{clients - len(done)} of {clients} clients failed.")
    return sum(done) / (time.perf_counter() - started)
