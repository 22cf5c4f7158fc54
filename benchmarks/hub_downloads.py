"""64 clients at once download an adapter with `snapshot_download`, from `adaptory serve` and from nginx.

nginx serves the same answers as files: what the registry says about the revision, and the adapter's files, with the
headers that `huggingface_hub` needs. So both sides get the same requests of the same client, and nginx neither asks who
is there nor what a channel serves. For S3, nginx redirects each download to an address that was signed before. Clients
are processes with tokens and caches of their own; they, the server and the S3 server share the cores, so seconds say
less than the server's own CPU time.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx2

from benchmarks import harness, load
from benchmarks.harness import Sample
from benchmarks.transfer import rss_bytes
from tests import s3_server
from tests.scenarios.world import Cli, build_world

CLIENTS, LARGE_BYTES, REPOSITORY = 64, 16_000_000, "acme/sql"
NGINX, OURS = "nginx, files", "adaptory, directory"
NGINX_S3, OURS_S3 = "nginx, redirects to S3", "adaptory, S3"
_CONF = """
daemon off; pid {directory}/pid; error_log {directory}/error.log; {user}
worker_processes auto;
events {{ worker_connections 2048; }}
http {{
  access_log off; sendfile on; tcp_nopush on; types {{ }} default_type application/octet-stream;
  server {{
    listen 127.0.0.1:{port} backlog=1024;
    add_header X-Repo-Commit {commit};
    location = /api/models/{repository}/revision/main {{ alias {directory}/info.json; default_type application/json; }}
    location = /api/models/{repository}/tree/{commit} {{ alias {directory}/tree.json; default_type application/json; }}
    {files}
  }}
}}
"""
_FILE = """
    location = /{repository}/resolve/{commit}/{path} {{
      {redirect}
      alias {content}; etag off;
      add_header X-Repo-Commit {commit}; add_header ETag '"{sha256}"'; add_header X-Linked-Size {size};
    }}
"""


@dataclass(frozen=True)
class Server:
    """A server to download from, and its process, whose children count too. In each round: its CPU seconds, and the
    errors of clients that gave up."""

    url: str
    process_id: int
    cpu_seconds: list[float] = field(default_factory=list[float])
    errors: list[list[str]] = field(default_factory=list[list[str]])


class Clients:
    """Processes that wait to download: what a test of a server should not measure, they have done before."""

    def __init__(self, directory: Path, token: str, stack: ExitStack) -> None:
        command = [sys.executable, "-m", "benchmarks.snapshots", str(CLIENTS), REPOSITORY, token, str(directory)]
        self._directory = directory
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        stack.callback(self._process.communicate)  # the end of its input is its end, and that of its children

    def download(self, server: Server) -> Sample:
        """Lets all of them download at once. Raises RuntimeError if none succeeds."""
        used, started = load.cpu_seconds(server.process_id), time.perf_counter()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{server.url}\n")
        self._process.stdin.flush()
        answers: list[float | str] = json.loads(self._process.stdout.readline())
        seconds = time.perf_counter() - started
        server.cpu_seconds.append(load.cpu_seconds(server.process_id) - used)
        server.errors.append([answer for answer in answers if isinstance(answer, str)])
        if len(server.errors[-1]) == len(answers):
            raise RuntimeError(f"All downloads from {server.url} failed: {answers[0]}")
        shutil.rmtree(self._directory)
        return Sample(seconds, calls=tuple(answer for answer in answers if not isinstance(answer, str)))


def publish(directory: Path, environment: Mapping[str, str]) -> tuple[Cli, str]:
    """A registry with one adapter of five files. Returns it with the token of a reader."""
    cli = Cli({"ADAPTORY_HOME": str(directory / "home"), "ADAPTORY_USER": "olga", **environment})
    world = build_world(directory / "world")
    adapter = world.adapters["sql"]
    (adapter / "README.md").write_text("# sql\n")
    (adapter / "tokenizer.json").write_bytes(os.urandom(LARGE_BYTES).hex().encode()[:LARGE_BYTES])
    (adapter / "tokenizer_config.json").write_text("{}")
    cli.ok("base", "add", world.base, "--name", "tiny")
    cli.ok("push", adapter, f"{REPOSITORY}:1.0.0", "--base", "tiny")
    cli.ok("namespace", "grant", "acme", "rita", "reader")
    return cli, cli.ok("token", "create", "--user", "rita").out.strip()


def serve(cli: Cli, stack: ExitStack) -> Server:
    port = load.free_port()
    command = [str(harness.ADAPTORY), "serve", "--port", str(port), "--no-worker"]
    process_id = stack.enter_context(load.process(port, command, **cli.environment, ADAPTORY_LOOPBACK_OPEN="true"))
    return Server(f"http://127.0.0.1:{port}", process_id)


@contextmanager
def nginx(directory: Path, origin: Server, token: str, *, redirect: bool) -> Generator[Server]:
    """nginx with the answers of a registry as they are now; with `redirect`, with its signed addresses too."""
    directory.mkdir()
    port = load.free_port()
    with httpx2.Client(base_url=origin.url, headers={"Authorization": f"Bearer {token}"}) as client:
        commit = _saved(client, f"/api/models/{REPOSITORY}/revision/main", directory / "info.json")["sha"]
        tree = _saved(client, f"/api/models/{REPOSITORY}/tree/{commit}?recursive=true", directory / "tree.json")
        files = "".join(_location(client, commit, row, directory, redirect=redirect) for row in tree)
    values = {"directory": directory, "port": port, "repository": REPOSITORY, "commit": commit, "files": files}
    user = "user root;" if os.geteuid() == 0 else ""  # its workers would not see the directory
    (directory / "nginx.conf").write_text(_CONF.format(**values, user=user))
    command = [shutil.which("nginx") or "nginx", "-p", str(directory), "-c", str(directory / "nginx.conf")]
    with load.process(port, command) as process_id:
        yield Server(f"http://127.0.0.1:{port}", process_id)


def _saved(client: httpx2.Client, path: str, target: Path) -> Any:
    answer = client.get(path).raise_for_status()
    target.write_bytes(answer.content)
    return answer.json()


def _location(client: httpx2.Client, commit: str, row: Mapping[str, Any], directory: Path, *, redirect: bool) -> str:
    """The part of nginx's configuration about one file, which is written below the directory."""
    path = f"/{REPOSITORY}/resolve/{commit}/{row['path']}"
    answer = client.get(path, follow_redirects=not redirect)
    content = directory / "files" / row["path"]
    content.parent.mkdir(parents=True, exist_ok=True)
    content.write_bytes(client.get(path, follow_redirects=True).raise_for_status().content)
    moved = f"if ($request_method = GET) {{ return 307 '{answer.headers['Location']}'; }}" if redirect else ""
    values = {"path": row["path"], "sha256": row["lfs"]["oid"], "size": row["size"], "content": content}
    return _FILE.format(repository=REPOSITORY, commit=commit, redirect=moved, **values)


def report(servers: Mapping[str, Server], floor: str, clients: Clients, rounds: int) -> None:
    cases = {name: partial(clients.download, server) for name, server in servers.items()}
    results = harness.interleave(cases, rounds)
    title = f"{CLIENTS} snapshots at once, 5 files, {LARGE_BYTES / harness.MB:.0f} MB"
    harness.report(title, results, floor)
    rows = [["case", "requests/s", "p50 s", "p95 s", "failed", "CPU, ms a snapshot", "RSS, MB: now, highest"]]
    for name, server in servers.items():
        calls = [each for sample in results[name] for each in sample.calls]
        requests = [CLIENTS * REQUESTS / sample.seconds for sample in results[name]]
        errors = [error for round_ in server.errors[1:] for error in round_]
        rows.append([
            name, harness.spread(requests), harness.figure(harness.percentile(calls, 0.5)),
            harness.figure(harness.percentile(calls, 0.95)), f"{len(errors)} of {CLIENTS * rounds}",
            harness.spread([seconds / CLIENTS * 1e3 for seconds in server.cpu_seconds[1:]]), _memory(server),
        ])  # fmt: skip
        for error in errors[:1]:
            print(f"{name}: {error[:300]}", file=sys.stderr)
    harness.table("What each server did", rows)


REQUESTS = 12
"""Of a snapshot of five files: the revision, its tree, and HEAD and GET for each file."""


def _memory(server: Server) -> str:
    pids = [server.process_id, *_children(server.process_id)]
    now, highest = (sum(values) / harness.MB for values in zip(*map(rss_bytes, pids), strict=True))
    return f"{harness.figure(now)}, {harness.figure(highest)}"


def _children(process_id: int) -> Sequence[int]:
    listed = Path(f"/proc/{process_id}/task/{process_id}/children").read_text()
    return [int(number) for number in listed.split()]


def compare(directory: Path, storage: Mapping[str, str], names: Mapping[str, str], rounds: int) -> None:
    """Runs a registry with that storage, and nginx with its answers."""
    directory.mkdir()
    cli, token = publish(directory, {"ADAPTORY_ACCESS": "tokens", "ADAPTORY_RATE_LIMIT": "", **storage})
    with ExitStack() as running:
        clients = Clients(directory / "caches", token, running)
        origin = serve(cli, running)
        plain = running.enter_context(nginx(directory / "nginx", origin, token, redirect=bool(storage)))
        report({names["floor"]: plain, names["ours"]: origin}, names["floor"], clients, rounds)


def main() -> None:
    chosen = harness.options(__doc__, rounds=5)
    if shutil.which("nginx") is None:
        raise SystemExit("nginx is not installed: `apt-get install nginx-light`.")
    harness.announce("hub_downloads", "huggingface_hub", "uvicorn")
    with ExitStack() as stack:
        directory = Path(stack.enter_context(TemporaryDirectory(prefix="adaptory-hub-")))
        s3 = s3_server.started(directory / "services")
        stack.callback(s3.stop)
        compare(directory / "local", {}, {"floor": NGINX, "ours": OURS}, chosen.rounds)
        compare(directory / "s3", s3.environment("bench/"), {"floor": NGINX_S3, "ours": OURS_S3}, chosen.rounds)


if __name__ == "__main__":
    main()
