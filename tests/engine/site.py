"""A registry whose jobs run on a Ray cluster: its processes, and the contents of its store."""

import json
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import yaml
from sqlalchemy import select, update

from registry.client.api import Api
from registry.database.tables import Job, Release, Repository
from registry.domain.jobs.queue import LEASE
from tests import services
from tests.durability.processes import wait_for_port
from tests.engine.cluster import RayCluster, others_environ
from tests.forked import start_command
from tests.s3_server import BUCKET
from tests.scenarios.test_compositions import write_recipe
from tests.scenarios.test_crashes import resources_of
from tests.scenarios.world import Cli

LOOSE = {"thresholds": {"probe_loss": 100, "probe_answers": 0, "probe_guard": 100}}
OUTPUTS = ("acme/assistant", "acme/assistant-merged")
INPUTS = [{"adapter": "acme/sql@prod", "suite": "sql-exact"}, {"adapter": "acme/support", "suite": "support-exact"}]


@dataclass(frozen=True)
class Site:
    """A registry with two adapters, and a cluster whose nodes share its store."""

    cli: Cli
    cluster: RayCluster
    worker_home: Path
    """The worker's own, so that it does not find the journal of a search that another process has made."""

    @property
    def worker_environ(self) -> dict[str, str]:
        own = {"ADAPTORY_HOME": str(self.worker_home)}
        return {**others_environ(), **self.cli.environment, **self.cluster.driver_environ, **own}

    def here(self, *words: object) -> Any:
        """The output of a command whose units run in its own process. Its results are removed, so that no node finds
        them."""
        made = self._output(words, {**others_environ(), **self.cli.environment})
        for key in unit_etags(self):
            services.shared_s3().client().delete_object(Bucket=BUCKET, Key=key)
        return made

    def on_cluster(self, *words: object) -> Any:
        """The output of a command that is the driver of the cluster."""
        return self._output(words, self.worker_environ)

    def _output(self, words: Sequence[object], environ: Mapping[str, str]) -> Any:
        """In a process of its own: Ray writes about nodes that die to the output of the tests' driver."""
        out, errors = (self.worker_home.with_name(f"command.{name}") for name in ("out", "errors"))
        process = start_command([*map(str, words), "--json"], environ, out, errors)
        process.join(300)
        assert process.exitcode == 0, out.read_text() + errors.read_text()
        return json.loads(out.read_text())


def recipe(directory: Path, version: str, seed: int = 0) -> Path:
    """A search, a probe, an evaluation, an adapter and a merged model. With another seed, units have other results."""
    own = directory / version
    own.mkdir()
    outputs = {kind: f"{name}:{version}" for kind, name in zip(("adapter", "model"), OUTPUTS, strict=True)}
    asked = {"optimize": {"search": 2, "confirm": 2, "seed": seed}, "evaluate": ["sql-exact", "guard-exact"]}
    return write_recipe(own, **{"inputs": INPUTS, "policy": LOOSE, "probe": 1, **asked, **outputs})


def judged_model(directory: Path, version: str) -> Path:
    """A merged model that is measured itself, since no adapter is made."""
    own = directory / f"model-{version}"
    own.mkdir()
    model = {"adapter": None, "model": f"acme/judged:{version}", "evaluate": ["sql-exact", "guard-exact"]}
    return write_recipe(own, **{"inputs": INPUTS, "policy": LOOSE, "probe": 0, **model})


def fitted(directory: Path, version: str) -> Path:
    """An adapter that is fitted to inputs, and a model made from it, after a probe."""
    own = directory / f"fitted-{version}"
    own.mkdir()
    how = {"method": "regmean", "settings": {"steps": 1, "examples": 4}, "policy": LOOSE, "probe": 1}
    outputs = {"adapter": f"acme/fitted:{version}", "model": f"acme/fitted-merged:{version}"}
    return write_recipe(own, **{"inputs": INPUTS, **how, **outputs})


def decided(composition: Mapping[str, Any]) -> dict[str, Any]:
    """The results that depend neither on the version nor on the time."""
    evidence = {k: v for k, v in composition["lock"].get("optimized", {}).items() if k not in ("seconds", "run")}
    measured = {name: composition[name] for name in ("candidate_scores", "gates")}
    check = {k: v for k, v in composition["conflicts"].items() if k not in ("probe", "summary")}
    return {"evidence": evidence, "check": check, **measured}


def files_of(site: Site, release: str) -> dict[str, str]:
    """Digests by path. An adapter's note names its release."""
    return {file["path"]: file["sha256"] for file in site.cli.json("show", release)["files"]}


@dataclass
class Stage:
    """The processes of a registry: a server, a worker that drives the cluster, and a node that may die."""

    site: Site
    directory: Path
    server: BaseProcess | None = None
    worker: BaseProcess | None = None
    port: int = field(default_factory=services.free_port)

    def __post_init__(self) -> None:
        self._serve()
        self._work()

    def _start(self, *words: str) -> BaseProcess:
        environ = {**self.site.worker_environ, "ADAPTORY_LOOPBACK_OPEN": "true"}
        return start_command(list(words), environ, self._log(words[0]))

    def _log(self, command: str) -> Path:
        return self.directory / f"{command}.log"

    def _serve(self) -> None:
        self.server = self._start("serve", "--port", str(self.port), "--no-worker")
        wait_for_port(self.port)

    def _work(self) -> None:
        self.worker = self._start("worker")

    def begin(self, path: Path) -> int:
        body = {"recipe": yaml.safe_load(path.read_text()), "plan": False}
        return Api(f"http://127.0.0.1:{self.port}").post("/v1/compositions", body)["id"]

    def kill(self, victim: str) -> None:
        """SIGKILL; the killed process is restarted at once, without waiting a minute for the worker's lease."""
        if victim == "node":
            cluster = self.site.cluster
            cluster.kill(cluster.nodes[1])
            cluster.start()
        elif victim == "server" and self.server is not None:
            self.server.kill()
            self.server.join()
            self._serve()
        elif self.worker is not None:
            self.worker.kill()
            self.worker.join()
            with resources_of(self.site.cli.environment) as resources, resources.write() as session:
                silent = resources.clock() - 2 * LEASE
                session.execute(update(Job).where(Job.state == "running").values(heartbeat_at=silent))
            self._work()

    def remembered(self, before: Mapping[str, str], seed: int) -> dict[str, str]:
        """The maker and time of each unit's result. Earlier ones are unchanged unless a finished unit was run again."""
        now = unit_etags(self.site)
        assert {key: now[key] for key in before} == before, f"a finished unit was run again; seed {seed}"
        return now

    def versions(self, name: str) -> list[str]:
        with resources_of(self.site.cli.environment) as resources, resources.read() as session:
            versions = select(Release.version).join(Repository, Release.repository_id == Repository.id)
            return list(session.scalars(versions.where(Repository.name == name.partition("/")[2])))

    def published(self, version: str) -> set[str]:
        """The repositories with that version, at one moment."""
        with resources_of(self.site.cli.environment) as resources, resources.read() as session:
            named = select(Repository.namespace, Repository.name).join(Release, Release.repository_id == Repository.id)
            return {"/".join(row) for row in session.execute(named.where(Release.version == version))}

    def shown(self, composition: int) -> dict[str, Any]:
        return Api(f"http://127.0.0.1:{self.port}").get(f"/v1/compositions/{composition}")

    def ended(self, composition: int) -> str:
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline:
            state = self.shown(composition)["state"]
            if state not in ("queued", "running"):
                return state
            time.sleep(0.1)
        raise AssertionError(self._where_the_worker_is(composition))

    def _where_the_worker_is(self, composition: int) -> str:
        """The job, and the stacks of the worker's threads."""
        job = self.shown(composition)
        ended = self.worker.exitcode if self.worker is not None else None
        if self.worker is not None and self.worker.pid is not None and ended is None:
            os.kill(self.worker.pid, signal.SIGABRT)
            self.worker.join()
        return f"worker: {ended}, {job}\n{self._log('worker').read_text()[-20_000:]}"

    def cancelled(self, path: Path) -> float:
        """Cancels a composition while its units run, and returns the seconds until all have stopped."""
        before, composition = unit_etags(self.site), self.begin(path)
        deadline = time.monotonic() + 180
        while len(unit_etags(self.site)) < len(before) + 4:
            if time.monotonic() > deadline:
                raise AssertionError(self._where_the_worker_is(composition))
            time.sleep(0.05)
        asked = time.monotonic()
        Api(f"http://127.0.0.1:{self.port}").post(f"/v1/compositions/{composition}/cancel", {})
        assert self.ended(composition) == "cancelled"
        while self.site.cluster.runners:
            assert time.monotonic() < asked + 60
            time.sleep(0.05)
        return time.monotonic() - asked

    def close(self) -> None:
        for process in (self.server, self.worker):
            if process is not None:
                process.kill()
                process.join()


def unit_etags(site: Site) -> dict[str, str]:
    """The store's version of each unit's result, by key: results that are written again differ in their seconds."""
    server, prefix = services.shared_s3(), site.cli.environment["ADAPTORY_STORAGE__PREFIX"]
    pages = server.client().get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{prefix}work/")
    rows = [row for page in pages for row in page.get("Contents", ())]
    return {row["Key"]: row["ETag"] for row in rows if row["Size"] > len("{}")}
