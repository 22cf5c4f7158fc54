"""Starting a server: it prints its address, or the reason why it cannot start."""

import hashlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import httpx2
import pytest
from sqlalchemy import text

from registry.api.http import protocol
from registry.api.http.protocol import MAX_PIPELINED
from registry.cli.operations.server import HUNG_S
from registry.database.migrate import head_revision
from tests import services
from tests.durability.processes import wait_for_port
from tests.eventually import eventually
from tests.forked import start
from tests.scenarios.traces import opened
from tests.scenarios.world import Cli, server

LISTENING = re.compile(r"listening on (http://127\.0\.0\.1:\d+)")


@contextmanager
def served(home: Path, *options: str, **settings: str) -> Generator[tuple[str, subprocess.Popen[str], Path]]:
    """Its URL, the started process, and its output."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ADAPTORY_")}
    environment |= {"ADAPTORY_LOOPBACK_OPEN": "true", **settings}
    command = [sys.executable, "-m", "registry.cli.start", "serve", "--port", "0", "--no-worker", *options]
    said = home.with_name(f"{home.name}.said")
    with said.open("w") as log:
        process = subprocess.Popen(command, env=environment | {"ADAPTORY_HOME": str(home)}, stderr=log, text=True)
    try:
        yield eventually(lambda: LISTENING.findall(said.read_text()))[0], process, said
    finally:
        process.kill()
        process.wait(20)


def children(process: subprocess.Popen[str]) -> set[int]:
    """The processes that answer for this one."""
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return {int(pid) for pid in listed if "spawn_main" in _command_line(pid)}


def _command_line(pid: str) -> str:
    """Empty of a process that is gone since it was listed."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def lives(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.long  # by default `served` waits for that, and several processes stop
def test_a_server_says_where_it_listens(tmp_path: Path) -> None:
    with served(tmp_path / "home") as (url, process, _):
        assert httpx2.get(f"{url}/healthz", timeout=30).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


@pytest.mark.parametrize("stop", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_several_processes_answer_without_torch_and_stop_together(
    pairing: dict[str, str], tmp_path: Path, stop: signal.Signals
) -> None:
    with served(tmp_path / "home", "--processes", "2", **pairing) as (url, process, _):
        assert httpx2.get(f"{url}/v1/releases", timeout=30).json()["items"] == []
        pids = eventually(lambda: children(process))
        assert len(pids) == 2
        assert all("torch" not in Path(f"/proc/{pid}/maps").read_text() for pid in (*pids, process.pid))
        process.send_signal(stop)
        assert process.wait(30) == 0
        assert not any(lives(pid) for pid in pids)
        with pytest.raises(httpx2.TransportError):
            httpx2.get(f"{url}/healthz")


@pytest.mark.long
def test_a_process_that_dies_is_replaced_and_named(pairing: dict[str, str], tmp_path: Path) -> None:
    with served(tmp_path / "home", "--processes", "2", **pairing) as (url, process, said):
        httpx2.get(f"{url}/healthz", timeout=30)
        victim = max(children(process))
        os.kill(victim, signal.SIGSTOP)
        time.sleep(1)  # it is called with an option that it does not have
        os.kill(victim, signal.SIGKILL)
        eventually(lambda: victim not in (now := children(process)) and len(now) == 2, within_s=HUNG_S - 5)
        assert f"{victim}] died" in said.read_text()
        for _ in range(8):
            assert httpx2.get(f"{url}/readyz", timeout=30).status_code == 200


@pytest.mark.long
def test_a_process_that_cannot_start_ends_all_and_says_why(pairing: dict[str, str], tmp_path: Path) -> None:
    with served(tmp_path / "home", "--processes", "2", **pairing) as (url, process, said):
        httpx2.get(f"{url}/healthz", timeout=30)
        registry = Cli({"ADAPTORY_HOME": str(tmp_path / "home"), **pairing})
        with closing(opened(registry)) as resources, resources.write() as session:
            session.execute(text("UPDATE alembic_version SET version_num = '9999', oldest_code = '9999'"))
        os.kill(max(children(process)), signal.SIGKILL)
        assert process.wait(60) == 7
        assert "Install a newer adaptory" in said.read_text()


@pytest.mark.long
def test_server_processes_do_not_outlive_the_one_that_watches_over_them(tmp_path: Path) -> None:
    with served(tmp_path / "home", "--processes", "2") as (url, process, _):
        httpx2.get(f"{url}/healthz", timeout=30)
        pids = children(process)
        process.kill()
        eventually(lambda: not any(lives(pid) for pid in pids))


def address_in_the_audit(url: str, claimed: str) -> str:
    """The address in the audit log for an act whose request claims another address."""
    suite = {"name": "exact", "kind": "target", "chat": False, "examples": [{"prompt": "a", "completion": "b"}]}
    httpx2.post(f"{url}/v1/suites", json=suite, headers={"X-Forwarded-For": claimed}, timeout=30).raise_for_status()
    (row,) = httpx2.get(f"{url}/v1/audit", params={"act": "suite:add"}, timeout=30).json()["items"]
    return str(row["source"]).partition(" ")[0]


@pytest.mark.long
@pytest.mark.parametrize(("processes", "kind"), [("1", services.PAIRINGS[0]), ("2", services.PAIRINGS[1])])
def test_what_a_request_says_of_where_it_comes_from_is_believed_of_a_named_proxy_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: str, kind: str
) -> None:
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")  # the web server's own metrics, which we do not use
    with served(tmp_path / "anybody", "--processes", processes, **services.pairing(kind)) as (url, _, _):
        assert address_in_the_audit(url, "6.6.6.6") == "127.0.0.1"
    proxy = {"ADAPTORY_TRUSTED_PROXIES": "10.0.0.7,127.0.0.1", **services.pairing(kind)}
    with served(tmp_path / "proxy", "--processes", processes, **proxy) as (url, _, _):
        assert address_in_the_audit(url, "6.6.6.6, 5.5.5.5, 10.0.0.7") == "5.5.5.5", "what the client said is not asked"


def test_a_header_without_an_end_is_cut_off_and_costs_no_memory(tmp_path: Path) -> None:
    with server(tmp_path / "home") as (url, process):
        before = resident_bytes(process.pid or 0)
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as line:
            line.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Endless: ")
            sent = 0
            try:
                while sent < 64 << 20:
                    sent += line.send(b"x" * (1 << 16))
            except OSError:  # hung up
                pass
        assert sent < 16 << 20
        assert resident_bytes(process.pid or 0) - before < 32 << 20
        assert httpx2.get(f"{url}/healthz").status_code == 200


def test_answers_to_requests_that_are_sent_together_come_in_their_order(tmp_path: Path) -> None:
    with server(tmp_path / "home") as (url, _):
        sent = [f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode() for path in ("/healthz", "/v1/whoami")]
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as line:
            line.sendall(b"".join(sent))
            received = b""
            while received.count(b"HTTP/1.1 200 OK") < len(sent) or not received.endswith(b"}"):
                received += line.recv(1 << 16)
            first, second = received.split(b"HTTP/1.1 200 OK")[1:]
            assert (b'"status"' in first, b'"user"' in second) == (True, True)


@pytest.mark.long
def test_a_head_that_does_not_go_on_or_does_not_begin_is_given_up(tmp_path: Path) -> None:
    port = services.free_port()
    serving = start(_serve_with_short_heads, {"ADAPTORY_HOME": str(tmp_path / "home")}, port)
    try:
        wait_for_port(port)
        with ExitStack() as stack:
            silent, slow, later = (
                stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30)) for _ in range(3)
            )
            for line in (slow, later):
                line.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n")
            later.sendall(b"\r\n")
            assert later.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
            started = time.monotonic()
            for line in (slow, silent):
                assert line.recv(1 << 16) == b""
                assert SHORT_HEAD_S / 2 < time.monotonic() - started < SHORT_HEAD_S * 3
    finally:
        serving.kill()
        serving.join()


SHORT_HEAD_S = 3


def _serve_with_short_heads(port: int) -> None:
    from registry.cli.start import run

    protocol.HEAD_S = SHORT_HEAD_S
    sys.argv = ["adaptory", "serve", "--no-worker", "--port", str(port)]
    run()


CHUNKED = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n"


def test_what_is_said_behind_a_body_is_no_header_and_costs_no_memory(tmp_path: Path) -> None:
    """Otherwise it could name another host, user or address than the head that a proxy has checked."""
    with server(tmp_path / "home") as (url, process):
        address, before = ("127.0.0.1", int(url.rpartition(":")[2])), resident_bytes(process.pid or 0)
        for field in (b"Host: elsewhere.example", b"Origin: http://elsewhere.example"):
            with socket.create_connection(address) as line:
                line.sendall(CHUNKED + field + b"\r\n\r\n")
                assert line.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
        for more in (b"X-%d: %s\r\n", b"%d%s"):
            with socket.create_connection(address) as line:
                line.sendall(CHUNKED)
                sent = 0
                try:
                    while sent < 64 << 20:
                        sent += line.send(more % (sent, b"x" * 1000) * 60)
                except OSError:  # hung up
                    pass
            assert sent < 16 << 20
        assert resident_bytes(process.pid or 0) - before < 32 << 20


def test_requests_that_come_before_the_answers_to_others_are_bounded(tmp_path: Path) -> None:
    with server(tmp_path / "home") as (url, process):
        address, before = ("127.0.0.1", int(url.rpartition(":")[2])), resident_bytes(process.pid or 0)
        asked = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
        for requests, answered in ((MAX_PIPELINED, MAX_PIPELINED), (1_000_000, 0)):
            with socket.create_connection(address) as line:
                received = b""
                with suppress(OSError):  # hung up
                    line.sendall(asked * requests)
                while received.count(b'"ok"') < answered:
                    received += line.recv(1 << 16)
        assert resident_bytes(process.pid or 0) - before < 32 << 20
        assert httpx2.get(f"{url}/healthz").status_code == 200


def test_files_whose_clients_hang_up_are_closed(tmp_path: Path) -> None:
    content = b"weights " * (1 << 20)
    row = {"path": "a", "size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    with server(tmp_path / "home") as (url, process), httpx2.Client(base_url=url) as http:
        asked = {"namespace": "acme", "files": [row]}
        (upload,) = http.post("/v1/uploads", json=asked).raise_for_status().json()["files"]
        http.put(upload["put"]["url"], content=content).raise_for_status()
        http.post(f"/v1/uploads/{upload['upload']}/complete").raise_for_status()
        opened = Path(f"/proc/{process.pid}/fd")
        before = len(list(opened.iterdir()))
        for _ in range(100):
            with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as line:
                line.sendall(f"GET /v1/blobs/{row['sha256']} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
                assert line.recv(1000).startswith(b"HTTP/1.1 200 ")
        eventually(lambda: len(list(opened.iterdir())) <= before + 5, within_s=20)


def test_headers_that_are_far_too_long_are_answered_431_as_well(tmp_path: Path) -> None:
    with server(tmp_path / "home") as (url, _):
        for size in (300 << 10, 1 << 20, 3 << 20):
            answer = httpx2.get(f"{url}/v1/whoami", headers={"X-Long": "x" * size})
            assert answer.status_code == 431
            assert answer.headers["content-type"] == "application/problem+json"
            assert answer.json()["code"] == "headers_too_large"


def test_a_running_server_is_not_ready_while_its_database_has_another_schema(
    pairing: dict[str, str], tmp_path: Path
) -> None:
    with served(tmp_path / "home", **pairing) as (url, _, _):
        registry = Cli({"ADAPTORY_HOME": str(tmp_path / "home"), **pairing})
        with closing(opened(registry)) as resources:
            for schema, code, next_step in (
                ("0001", "schema_old", "Run `adaptory migrate`"),
                ("9999", "schema_new", "Install a newer adaptory"),
            ):
                with resources.database.write() as session:
                    session.execute(
                        text("UPDATE alembic_version SET version_num = :schema, oldest_code = :schema"),
                        {"schema": schema},
                    )
                ready = httpx2.get(f"{url}/readyz", timeout=30)
                assert (ready.status_code, ready.json()["code"]) == (503, code)
                assert next_step in ready.json()["next"]
                assert httpx2.get(f"{url}/healthz").status_code == 200
            with resources.database.write() as session:
                session.execute(text("UPDATE alembic_version SET version_num = :head"), {"head": head_revision()})
        assert httpx2.get(f"{url}/readyz", timeout=30).status_code == 200


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_port_in_use_is_refused_without_touching_the_registry(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ran = Cli({"ADAPTORY_HOME": str(tmp_path / "home")})("serve", "--port", taken.getsockname()[1])
    assert ran.code == 7
    assert "Cannot listen on" in ran.err
    assert not (tmp_path / "home").exists()
