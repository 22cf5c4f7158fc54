"""A Ray cluster on this host: a head and more nodes, each a group of processes that a test can kill."""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.services import free_port

REPOSITORY = Path(__file__).parents[2]
START_S = 60.0
_TOKEN = secrets.token_hex(32)  # Ray keeps the first one that a process has used
_STORE_BYTES = str(80 << 20)


def others_environ() -> dict[str, str]:
    """This process's environment without variables of Ray and of a registry."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("ADAPTORY_", "RAY_"))}


@dataclass
class RayNode:
    """One node: `ray start --block` and all processes that it started."""

    process: subprocess.Popen[bytes]

    @property
    def family(self) -> list[psutil.Process]:
        """All of its processes."""
        try:
            return [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def kill(self) -> None:
        """SIGKILL to all of it, as when a host loses power."""
        family = self.family
        for member in family:
            try:
                member.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        self.process.wait()
        psutil.wait_procs(family, timeout=10)


@dataclass
class RayCluster:
    """A cluster, with tokens unless `secured` is false. `environ` and `resources` are those of its nodes."""

    environ: Mapping[str, str]
    secured: bool = True
    resources: str = "{}"
    port: int = field(default_factory=free_port)
    nodes: list[RayNode] = field(default_factory=list[RayNode])
    directory: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="ray-")))

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def token_path(self) -> Path:
        """A file with the cluster's token. Ray's sockets need a short path, so it is not in the test's directory."""
        path = self.directory / "token"
        if not path.exists():
            path.write_text(_TOKEN)
            path.chmod(0o600)
        return path

    @property
    def driver_environ(self) -> dict[str, str]:
        """The settings of a worker that uses the cluster."""
        named = {"ADAPTORY_ENGINE__KIND": "ray", "ADAPTORY_ENGINE__ADDRESS": self.address}
        return {**named, "ADAPTORY_ENGINE__TOKEN_PATH": str(self.token_path)}

    def start(self, *, cpus: float = 1, gpus: int = 0) -> RayNode:
        """Starts a node, the first one as the head, and waits until the cluster has it."""
        how = ["--head", f"--port={self.port}", "--include-dashboard=false", f"--temp-dir={self.directory}"]
        kind = [f"--address={self.address}"] if self.nodes else how
        ports = ["--min-worker-port=0", "--max-worker-port=0"]
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"),
            *(*kind, "--node-ip-address=127.0.0.1", f"--num-cpus={cpus:g}", f"--num-gpus={gpus}"),
            *(f"--object-store-memory={_STORE_BYTES}", f"--resources={self.resources}", *ports),
            "--include-log-monitor=false",  # units' output is not sent to drivers
        ]
        auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token_path)}
        environ = {
            **others_environ(),
            **self.environ,
            **(auth if self.secured else {"RAY_AUTH_MODE": "disabled"}),
            "PYTHONPATH": str(REPOSITORY),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",  # Ray's 15 would starve a unit beside the other tests
        }
        output = (self.directory / f"node-{len(self.nodes)}-{time.monotonic_ns()}.log").open("wb")
        node = RayNode(subprocess.Popen(command, env=environ, stdout=output, stderr=output))
        self.nodes.append(node)
        self._wait_until_started(node, Path(output.name))
        return node

    def _wait_until_started(self, node: RayNode, output: Path) -> None:
        deadline = time.monotonic() + START_S
        while b"Ray runtime started" not in output.read_bytes():
            assert node.process.poll() is None, output.read_text()
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(0.1)

    @property
    def runners(self) -> list[psutil.Process]:
        """The processes of its nodes that run units."""
        return [member for node in self.nodes for member in node.family if _title(member).startswith("ray::UnitRunner")]

    def kill(self, node: RayNode) -> None:
        """Kills a node that is not the head."""
        self.nodes.remove(node)
        node.kill()

    def stop(self) -> None:
        """Kills all of it. Never `ray stop`, which ends every cluster of the host."""
        for node in reversed(self.nodes):
            node.kill()
        shutil.rmtree(self.directory, ignore_errors=True)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""
