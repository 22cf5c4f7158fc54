"""Services that a test may break without harming others: its own PostgreSQL and disk; and a request for every route."""

import hashlib
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from fastapi.routing import APIRoute

from composer.formats.checkpoints.hashing import weights_digest
from registry.api.app import routers
from registry.client.api import Api
from registry.client.push import push
from registry.worker.runner import run_worker
from registry.worker.steps import KINDS
from tests import services
from tests.durability.processes import CHANNEL, NAME, resources
from tests.durability.small import adapter_files


@dataclass
class Postgres:
    """A cluster that returns at the same address."""

    directory: Path

    def start(self) -> str:
        return services.start_postgres(self.directory)

    def stop(self) -> None:
        """Stops like a crash: closes no connection properly."""
        services.stop_postgres(self.directory)

    def freeze(self) -> None:
        """Freezes it: its kernel still accepts connections and packets, but nothing answers."""
        for pid in self._pids():
            os.kill(pid, signal.SIGSTOP)

    def thaw(self) -> None:
        for pid in self._pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def _pids(self) -> Iterator[int]:
        first = int((self.directory / "pg" / "cluster" / "postmaster.pid").read_text().splitlines()[0])
        yield first
        yield from map(int, Path(f"/proc/{first}/task/{first}/children").read_text().split())


@dataclass
class Disk:
    """A file system of `size_bytes` in memory. Only root can mount one."""

    directory: Path
    size_bytes: int = 8 << 20

    def mount(self) -> None:
        self.directory.mkdir(parents=True)
        _run("mount", "-t", "tmpfs", "-o", f"size={self.size_bytes}", "adaptory-test", self.directory)

    def unmount(self) -> None:
        _run("umount", "--lazy", self.directory)

    def fill(self) -> None:
        """Fills it to the last byte."""
        with suppress(OSError), (self.directory / "ballast").open("ab", buffering=0) as ballast:
            while True:
                ballast.write(bytes(min(1 << 16, max(1, shutil.disk_usage(self.directory).free))))

    def free(self) -> None:
        (self.directory / "ballast").unlink()


def _run(program: str, *arguments: object) -> None:
    subprocess.run([str(shutil.which(program)), *map(str, arguments)], check=True)


WITHOUT_DATABASE = {("GET", "/healthz"), ("GET", "/v1/whoami")}


@dataclass(frozen=True)
class Stock:
    """Ids of existing things, for the paths of routes: one release of acme/sql, one composition, one upload."""

    version: str
    composition_id: int
    job_id: int
    upload_id: str
    announced: str
    sha256: str

    def requests(self) -> list[tuple[str, str, dict[str, Any]]]:
        """One valid request for each route: (method, path, arguments of httpx)."""
        requests: list[tuple[str, str, dict[str, Any]]] = []
        for router in routers():
            for route in router.routes:
                assert isinstance(route, APIRoute)
                methods = sorted(route.methods or ())
                requests += [
                    (method, self._path(method, route.path), self.body(method, route.path)) for method in methods
                ]
        return requests

    def _path(self, method: str, template: str) -> str:
        blob = self.announced if method == "PUT" else self.sha256
        values = {
            "{namespace}": "acme", "{name}": "sql", "{version}": self.version, "{channel}": "prod",
            "{base:path}": "tiny", "{path:path}": "adapter_model.safetensors",
            "{suite:path}": "exact", "{sha256}": blob,
            "{job_id}": self.job_id, "{composition_id}": self.composition_id, "{upload_id}": self.upload_id,
            "{token_id}": "aaaaaaaaaaaa", "{alias:path}": "Acme/Nothing", "{number}": 1, "{metric}": "nll",
            "{promotion_id}": 1, "{change_id}": 1, "{user}": "ann", "{key}": "aaaaaaaaaaaa",
            "{group}": "prod", "{node}": "gpu-1", "{publisher_id}": "aaaaaaaaaaaa", "{check_id}": 1,
            "{webhook_id}": "aaaaaaaaaaaa", "{delivery_id}": 1,
        }  # fmt: skip
        for name, value in values.items():
            template = template.replace(name, str(value))
        assert "{" not in template, f"say above what {template} is filled with"
        queries = {
            "/v1/resolve": "?ref=acme/sql",
            "/v1/follow": "?channels=acme/sql@prod",
            f"/v1/blobs/{self.announced}": f"?upload={self.upload_id}",
        }
        if template.startswith("/v1/fleet/") and method == "DELETE":
            return f"{template}?namespace=acme"
        if template.endswith("/judgement"):
            return f"{template}?version={self.version}"
        return template + queries.get(template, "")

    def body(self, method: str, template: str) -> dict[str, Any]:
        """The body for the route, as arguments of httpx."""
        if method in ("GET", "HEAD", "DELETE"):
            return {}
        if template.startswith("/v1/blobs/"):
            return {"content": b"x"}
        file = {"path": "adapter_model.safetensors", "size_bytes": 10, "sha256": "1" * 64}
        example = {"prompt": "a", "completion": "b"}
        score = {"suite_digest": "2" * 64, "metric": "nll", "value": 0.5, "n": 1, "higher_is_better": False}
        followed = {"channel": "acme/sql@prod", "state": "following", "since": "2026-01-01T00:00:00Z"}
        tensor = {"name": "w", "dtype": "F32", "shape": [1], "sha256": "3" * 64}
        bodies: dict[str, Any] = {
            "/v1/fleet/{group}/{node}": {"agent": "adaptory", "channels": [followed]},
            "/v1/suites/{suite:path}/shared": {"shared": True},
            "/v1/suites": {"name": "exact", "kind": "target", "chat": False, "examples": [example]},
            "/v1/bases": {
                "name": "new", "model_type": "llama", "tied": False,
                "weights_digest": weights_digest([("w", "F32", (1,), "3" * 64)]), "tensors": [tensor],
            },
            "/v1/uploads": {"namespace": "acme", "files": [file]},
            "/v1/compositions": {"recipe": {"inputs": ["acme/sql"], "method": "stack"}, "plan": True},
            "/v1/namespaces/{namespace}/members": {"user": "ann", "role": "reader"},
            "/v1/publishers/{namespace}/{name}": {
                "issuer": "github",
                "project": "acme/ci",
                "ref": "refs/heads/main",
                "workflow": "ci.yml",
            },
            "/v1/webhooks": {"namespace": "acme", "url": "https://ops.example/hook"},
            "/v1/users/{user}/person": {"subject": "1", "issuer": "https://login.example"},
            "releases": {"version": "9.0.0", "base": "tiny", "files": [file]},
            "next-version": {"bump": "minor", "base": "tiny", "files": [file]},
            "signatures": {"bundle": "{}"},
            "scores": {"scores": [score]},
            "yank": {"reason": "because"},
            "unyank": {"reason": "because"},
            "takedown": {"reason": "because"},
            "quota": {"max_bytes": 10**12, "max_releases": None},
            "retention": {"keep_yanked_days": 30, "keep_prerelease_days": None},
            "plan": {"keep_yanked_days": 30, "keep_prerelease_days": None},
            "{channel}": {"version": self.version},
            "canary": {"version": self.version, "weight": 10},
            "watch": {"source": "front", "versions": {}},
            "{number}": {"sha256": self.announced},
            "priority": {"priority": "low"},
            "gates": {"channel": "prod", "rules": ["exact.nll <= 9"]},
            "/v1/namespaces/{namespace}/policies/{channel}": {"version": 1},
            "changes": {"change": {"kind": "member", "user": "pia", "role": "releaser"}},
            "exception": {"until": "2030-01-01T00:00:00Z", "reason": "because"},
            "policy": {"version": 1, "rules": ["exact.nll <= 9"], "approval": {}},
            "approvals": {"version": self.version, "reason": "because"},
            "deprecate": {"reason": "because", "successor": None},
            "/v1/conflicts": {"inputs": [{"adapter": "acme/sql:1.0.0"}, {"adapter": "acme/sql:1.0.0"}]},
            "/v1/upgrades": {"old": "tiny", "new": "tiny"},
            "/v1/evaluations": {"releases": ["acme/sql:1.0.0"], "suites": ["exact"]},
        }  # fmt: skip
        return {"json": bodies.get(template, bodies.get(template.rpartition("/")[2], {}))}


def furnish(url: str, directory: Path) -> Stock:
    """acme/sql:1.0.0 on prod, a cancelled composition, and an upload without bytes."""
    api = Api(url)
    files = adapter_files(directory, 1)
    published, _ = push(api, files, NAME, "adapter", {"version": "1.0.0", "base": "tiny"}, lambda _count: None)
    release = published.release.document
    api.put(CHANNEL, {"version": "1.0.0"})
    composition = api.post("/v1/compositions", {"recipe": {"inputs": ["acme/sql"], "method": "stack"}, "plan": True})
    job = api.get("/v1/jobs")["items"][0]
    api.post(f"/v1/compositions/{composition['id']}/cancel")
    announced = hashlib.sha256(b"x").hexdigest()
    row = {"path": "notes.txt", "size_bytes": 1, "sha256": announced}
    (upload,) = api.post("/v1/uploads", {"namespace": "acme", "files": [row]})["files"]
    api.close()
    stored = next(file["sha256"] for file in release["files"] if file["path"] == "adapter_model.safetensors")
    return Stock("1.0.0", composition["id"], job["id"], upload["upload"], announced, stored)


def do_jobs(ready: str) -> None:
    """Runs a worker in its own process; creates the file `ready` when it has begun."""
    held = resources()
    Path(ready).touch()
    run_worker(held, KINDS, threading.Event())


def ask(url: str, request: tuple[str, str, dict[str, Any]], timeout_s: float = 60) -> httpx2.Response:
    method, path, sent = request
    return httpx2.request(method, f"{url}{path}", timeout=timeout_s, **sent)
