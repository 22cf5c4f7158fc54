"""An attempt to deliver connects to addresses that are allowed and to no others, and keeps only the status."""

import ipaddress
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from registry.environment.network import parse_networks
from registry.formats.webhooks import is_allowed, signature_headers
from registry.worker import receivers
from tests.receiver import Receiver, receiving

HERE = parse_networks("127.0.0.0/8")


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True), ("2606:2800:220:1::1", True), ("::ffff:93.184.216.34", True),
        ("127.0.0.1", False), ("10.1.2.3", False), ("172.16.0.1", False), ("192.168.1.1", False), ("0.0.0.1", False),
        ("169.254.169.254", False), ("100.100.100.200", False), ("168.63.129.16", False), ("192.0.0.192", False),
        ("224.0.0.1", False), ("255.255.255.255", False), ("::1", False), ("::", False), ("fe80::1", False),
        ("fd00:ec2::254", False), ("ff02::1", False), ("::ffff:127.0.0.1", False), ("::ffff:169.254.169.254", False),
        ("64:ff9b::7f00:1", False), ("64:ff9b::a9fe:a9fe", False), ("2002:7f00:1::", False), ("2002:a00:1::1", False),
        ("::127.0.0.1", False), ("2001:0:4136:e378::1", False), ("64:ff9b:1::1", False),
    ],
)  # fmt: skip
def test_a_peer_is_public_by_the_address_that_packets_reach_in_the_end(address: str, public: bool) -> None:
    parsed = ipaddress.ip_address(address)
    assert is_allowed(parsed, (), secure=True) is public
    assert not is_allowed(parsed, (), secure=False)
    assert is_allowed(parsed, parse_networks("0.0.0.0/0,::/0"), secure=False)


@pytest.fixture
def receiver() -> Generator[Receiver]:
    with receiving() as running:
        yield running


def test_a_name_that_resolves_to_a_private_address_is_not_connected_to(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name is resolved once, and the address that was checked is the one that is connected to."""
    asked: list[str] = []
    connected: list[Any] = []

    def resolve(host: str, port: int, **_: Any) -> list[Any]:
        asked.append(host)
        answer = "127.0.0.1" if len(asked) > 1 else "::ffff:127.0.0.1"
        family = socket.AF_INET6 if ":" in answer else socket.AF_INET
        return [(family, socket.SOCK_STREAM, 6, "", (answer, port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(receivers.socket.socket, "connect", lambda _self, address: connected.append(address))
    url = receiver.url.replace("http://127.0.0.1", "https://rebinding.example")
    for _ in range(2):
        outcome = receivers.send(url, {}, b"{}", ())
        assert (outcome.status, "may be used" in (outcome.error or "")) == (None, True)
    assert (len(asked), connected, receiver.got) == (2, [], [])


def test_a_redirect_is_a_failure_and_is_not_followed(receiver: Receiver) -> None:
    receiver.answers = [302]
    outcome = receivers.send(receiver.url, {}, b"{}", HERE)
    assert (outcome.status, outcome.is_delivered, len(receiver.got)) == (302, False, 1)
    assert receivers.send("http://93.184.216.34/", {}, b"{}", HERE).status is None, "http only to those networks"


@contextmanager
def talking(talk: Callable[[socket.socket], None]) -> Generator[str]:
    """A server that speaks as `talk` does."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1 << 16)
                try:
                    talk(connection)
                except OSError:
                    return  # the sender has gone

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/"
        thread.join()


def _trickle(connection: socket.socket) -> None:
    for _ in range(100):
        connection.sendall(b"H")
        time.sleep(0.02)


def _flood(connection: socket.socket) -> None:
    while True:
        connection.sendall(b"x" * 65536)


@pytest.mark.parametrize(
    ("talk", "status", "words"),
    [
        (_trickle, None, "took more than"),
        (_flood, None, "did not answer with HTTP"),
        (lambda connection: connection.sendall(b"SSH-2.0-OpenSSH\r\n"), None, "did not answer with HTTP"),
        (lambda connection: None, None, "did not answer with HTTP"),
        (lambda connection: connection.sendall(b"HTTP/1.1 103 Early\r\nA: b\r\n\r\nHTTP/1.1 200 OK\r\n"), 200, None),
        (lambda connection: connection.sendall(b"HTTP/1.1 204\r\n\r\n"), 204, None),
    ],
)
def test_time_and_size_of_an_answer_are_bounded(
    talk: Callable[[socket.socket], None], status: int | None, words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receivers, "ATTEMPT_S", 0.3)
    with talking(talk) as url:
        outcome = receivers.send(url, {}, b"{}", HERE)
    assert outcome.status == status
    assert words is None or words in (outcome.error or "")


def test_signatures_are_those_of_the_test_vector_of_standard_webhooks() -> None:
    at = datetime.fromtimestamp(1614265330, UTC)
    headers = signature_headers(
        ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"], "msg_p5jXN8AQM9LWM0D4loKWxJek", at, b'{"test": 2432232314}'
    )
    assert headers == {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }


def test_an_https_receiver_needs_a_certificate_that_this_machine_trusts(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    words = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    words += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(["openssl", *words], check=True, capture_output=True)  # noqa: S607
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    statuses: list[int | None] = []
    for trusted in (False, True):
        if trusted:
            receivers.tls_context().load_verify_locations(certificate)
        with socket.create_server(("127.0.0.1", 0)) as server:
            thread = threading.Thread(target=_answer_by_tls, args=(server, context))
            thread.start()
            outcome = receivers.send(f"https://127.0.0.1:{server.getsockname()[1]}/", {}, b"{}", HERE)
            thread.join()
        statuses.append(outcome.status)
        assert trusted or "TLS failed" in (outcome.error or ""), outcome
    receivers.tls_context.cache_clear()
    assert statuses == [None, 204]


def _answer_by_tls(server: socket.socket, context: ssl.SSLContext) -> None:
    connection, _ = server.accept()
    with suppress(OSError), context.wrap_socket(connection, server_side=True) as secured:
        secured.recv(1 << 16)
        secured.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")
