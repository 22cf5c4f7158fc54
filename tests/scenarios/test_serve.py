"""Starting a server: it says where it listens, and why it cannot."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx2

from tests.scenarios.world import Cli, server


def test_a_server_says_where_it_listens(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ADAPTORY_")}
    command = [sys.executable, "-m", "registry.cli.main", "serve", "--port", "0", "--no-worker"]
    process = subprocess.Popen(
        command, env=environment | {"ADAPTORY_HOME": str(tmp_path)}, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    line = process.stderr.readline()
    assert line.startswith("listening on http://127.0.0.1:")
    assert httpx2.get(f"{line.split()[-1]}/healthz", timeout=30).status_code == 200
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) in (0, -signal.SIGTERM)
    process.stderr.close()


def test_a_header_without_an_end_is_cut_off_and_costs_no_memory(tmp_path: Path) -> None:
    with server(tmp_path / "home") as (url, process):
        before = resident_bytes(process.pid)
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as line:
            line.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Endless: ")
            sent = 0
            try:
                while sent < 64 << 20:
                    sent += line.send(b"x" * (1 << 16))
            except OSError:  # hung up
                pass
        assert sent < 16 << 20
        assert resident_bytes(process.pid) - before < 32 << 20
        assert httpx2.get(f"{url}/healthz").status_code == 200


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_port_in_use_is_told_without_touching_the_registry(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ran = Cli({"ADAPTORY_HOME": str(tmp_path / "home")})("serve", "--port", taken.getsockname()[1])
    assert ran.code == 7
    assert "cannot be listened on" in ran.err
    assert not (tmp_path / "home").exists()
