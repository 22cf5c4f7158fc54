"""Jobs whose units run on two Ray nodes, with a real S3 server and PostgreSQL: the same results as in one process."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from sqlalchemy import select, update

from registry.client.api import Api
from registry.database.tables import Job, Release, Repository
from registry.domain.jobs.queue import LEASE
from registry.worker.engine.ray import base_resource
from tests import services
from tests.durability.processes import wait_for_port
from tests.engine.cluster import REPOSITORY, RayCluster, runners
from tests.s3_server import BUCKET
from tests.scenarios.conftest import USER, Templates, templates, world
from tests.scenarios.test_compositions import release_all, write_recipe
from tests.scenarios.test_crashes import resources_of
from tests.scenarios.world import Cli, World

__all__ = ["templates", "world"]  # fixtures

LOOSE = {"thresholds": {"probe_loss": 100, "probe_answers": 0, "probe_guard": 100}}
OUTPUTS = ("acme/assistant", "acme/assistant-merged")
INPUTS = [{"adapter": "acme/sql@prod", "suite": "sql-exact"}, {"adapter": "acme/support", "suite": "support-exact"}]


@dataclass(frozen=True)
class Site:
    """A registry with two adapters, and a cluster whose nodes share its store."""

    cli: Cli
    cluster: RayCluster
    resources: str
    """Which bases its nodes say that they have."""
    worker_home: Path
    """The worker's own, so that it does not find the journal of a search that another process has made."""

    @property
    def worker_environ(self) -> dict[str, str]:
        own = {"PATH": "/usr/bin:/bin", "ADAPTORY_HOME": str(self.worker_home)}
        return {**self.cli.environment, **self.cluster.driver_environ, **own}

    def on_cluster(self, *words: object) -> Any:
        """The output of a command in a process of its own, which is the driver."""
        command = [sys.executable, "-m", "registry.cli.start", *map(str, words), "--json"]
        ran = subprocess.run(
            command, env=self.worker_environ, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return json.loads(ran.stdout)


@pytest.fixture(scope="module")
def site(templates: Templates, world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("site")
    pairing = templates.copy(services.PAIRINGS[1], directory / "home")
    environ = {"ADAPTORY_HOME": str(directory / "home"), "ADAPTORY_USER": USER, **pairing}
    cli = release_all(Cli(environ), world)
    digest = cli.json("base", "show", "tiny")["digest"]
    cluster = RayCluster(environ)
    try:
        resources = json.dumps({base_resource(digest): 1})
        for _ in range(2):
            cluster.start(resources=resources)
        yield Site(cli, cluster, resources, directory / "worker")
    finally:
        cluster.stop()


def recipe(directory: Path, version: str, seed: int = 0) -> Path:
    """A search, an evaluation, an adapter and a merged model. With another seed, each unit has another result."""
    own = directory / version
    own.mkdir()
    outputs = {kind: f"{name}:{version}" for kind, name in zip(("adapter", "model"), OUTPUTS, strict=True)}
    asked = {"optimize": {"search": 2, "confirm": 2, "seed": seed}, "evaluate": ["sql-exact", "guard-exact"]}
    return write_recipe(own, **{"inputs": INPUTS, "policy": LOOSE, "probe": 0, **asked, **outputs})


def test_a_search_and_an_evaluation_on_two_nodes_give_what_one_process_gives(site: Site, tmp_path: Path) -> None:
    here = site.cli.json("compose", recipe(tmp_path, "1.0.0"))
    there = site.on_cluster("compose", recipe(tmp_path, "1.1.0"))
    assert decided(there) == decided(here)
    for repository in OUTPUTS:
        assert files_of(site, f"{repository}:1.1.0") == files_of(site, f"{repository}:1.0.0")
    assert len(unit_etags(site)) > 20, "passes and slices, which the nodes wrote"


def decided(composition: Mapping[str, Any]) -> dict[str, Any]:
    """What does not depend on the version or on the time."""
    evidence = {k: v for k, v in composition["lock"]["optimized"].items() if k not in ("seconds", "run")}
    return {"evidence": evidence, "scores": composition["candidate_scores"], "gates": composition["gates"]}


def files_of(site: Site, release: str) -> dict[str, str]:
    """Digests by path. An adapter's note names its release."""
    return {file["path"]: file["sha256"] for file in site.cli.json("show", release)["files"]}


VICTIMS = ("node", "worker", "server")


@pytest.mark.parametrize("rounds", [1, pytest.param(10, marks=pytest.mark.long)])
def test_a_composition_survives_the_death_of_a_node_of_its_worker_and_of_the_server(
    site: Site, tmp_path: Path, record_property: Callable[[str, object], None], rounds: int
) -> None:
    """Five deaths in each round, at random moments: the worker dies at most twice, since the third ends its job."""
    seed = int(os.environ.get("ADAPTORY_TEST_SEED", random.SystemRandom().randrange(10**6)))
    record_property("ADAPTORY_TEST_SEED", seed)
    chance = random.Random(seed)
    stage = Stage(site, tmp_path)
    try:
        for number in range(1, rounds + 1):
            site.cli.json("compose", recipe(tmp_path, f"0.1.{number}", number))
            shutil.rmtree(site.worker_home, ignore_errors=True)  # its journal knows what needs no fit
            version, before = f"0.2.{number}", unit_etags(site)
            made = before
            composition = stage.begin(recipe(tmp_path, version, number))
            victims = chance.sample([*VICTIMS, "node", "worker"], 5)
            for victim in victims:
                time.sleep(chance.uniform(0.5, 4.0))
                made = stage.remembered(made, seed)
                published = [name for name in OUTPUTS if version in stage.versions(name)]
                assert len(published) in (0, len(OUTPUTS)), f"half of it is published; seed {seed}"
                stage.kill(victim)
            assert stage.ended(composition) == "done", f"after {victims}; seed {seed}"
            assert len(stage.remembered(made, seed)) > len(before) + 20, "its own passes and slices"
            for name in OUTPUTS:
                assert files_of(site, f"{name}:{version}") == files_of(site, f"{name}:0.1.{number}"), seed
                assert stage.versions(name).count(version) == 1
        shutil.rmtree(site.worker_home, ignore_errors=True)
        record_property("seconds until cancelled", stage.cancelled(recipe(tmp_path, "0.3.0", rounds + 1)))
        assert "0.3.0" not in stage.versions("acme/assistant")
    finally:
        stage.close()


@dataclass
class Stage:
    """The processes of a registry: a server, a worker that drives the cluster, and a node that may die."""

    site: Site
    directory: Path
    server: "subprocess.Popen[bytes] | None" = None
    worker: "subprocess.Popen[bytes] | None" = None
    port: int = field(default_factory=services.free_port)

    def __post_init__(self) -> None:
        self._serve()
        self._work()

    def _start(self, *words: str) -> "subprocess.Popen[bytes]":
        log = (self.directory / f"{words[0]}.log").open("ab")
        command = [sys.executable, "-X", "faulthandler", "-m", "registry.cli.start", *words]
        return subprocess.Popen(command, env=self.site.worker_environ, cwd=REPOSITORY, stdout=log, stderr=log)

    def _serve(self) -> None:
        self.server = self._start("serve", "--port", str(self.port), "--no-worker")
        wait_for_port(self.port)

    def _work(self) -> None:
        self.worker = self._start("worker")

    def begin(self, path: Path) -> int:
        body = {"recipe": yaml.safe_load(path.read_text()), "plan": False}
        return Api(f"http://127.0.0.1:{self.port}").post("/v1/compositions", body)["id"]

    def kill(self, victim: str) -> None:
        """SIGKILL; what died comes back at once. Nobody waits a minute for the worker's lease here."""
        if victim == "node":
            cluster = self.site.cluster
            cluster.kill(cluster.nodes[1])
            cluster.start(resources=self.site.resources)
        elif victim == "server" and self.server is not None:
            self.server.kill()
            self.server.wait()
            self._serve()
        elif self.worker is not None:
            self.worker.kill()
            self.worker.wait()
            with resources_of(self.site.cli.environment) as resources, resources.write() as session:
                silent = resources.clock() - 2 * LEASE
                session.execute(update(Job).where(Job.state == "running").values(heartbeat_at=silent))
            self._work()

    def remembered(self, before: Mapping[str, str], seed: int) -> dict[str, str]:
        """Who made each unit's result and when. Those of before are unchanged, or a finished unit was run again."""
        now = unit_etags(self.site)
        assert {key: now[key] for key in before} == before, f"a finished unit was run again; seed {seed}"
        return now

    def versions(self, name: str) -> list[str]:
        with resources_of(self.site.cli.environment) as resources, resources.read() as session:
            versions = select(Release.version).join(Repository, Release.repository_id == Repository.id)
            return list(session.scalars(versions.where(Repository.name == name.partition("/")[2])))

    def ended(self, composition: int) -> str:
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline:
            state = Api(f"http://127.0.0.1:{self.port}").get(f"/v1/compositions/{composition}")["state"]
            if state not in ("queued", "running"):
                return state
            time.sleep(0.1)
        raise AssertionError(self._where_the_worker_is(composition))

    def _where_the_worker_is(self, composition: int) -> str:
        """The job, and the stacks of the worker's threads."""
        job = Api(f"http://127.0.0.1:{self.port}").get(f"/v1/compositions/{composition}")
        ended = self.worker.poll() if self.worker is not None else None
        if self.worker is not None and ended is None:
            self.worker.send_signal(signal.SIGABRT)
            self.worker.wait()
        return f"worker: {ended}, {job}\n{(self.directory / 'worker.log').read_text()[-20_000:]}"

    def cancelled(self, path: Path) -> float:
        """Cancels a composition while its units run, and returns the seconds until none does any more."""
        before, composition = unit_etags(self.site), self.begin(path)
        deadline = time.monotonic() + 60
        while len(unit_etags(self.site)) < len(before) + 4:
            assert time.monotonic() < deadline, "no unit has ended"
            time.sleep(0.05)
        asked = time.monotonic()
        Api(f"http://127.0.0.1:{self.port}").post(f"/v1/compositions/{composition}/cancel", {})
        assert self.ended(composition) == "cancelled"
        while runners():
            assert time.monotonic() < asked + 60
            time.sleep(0.05)
        return time.monotonic() - asked

    def close(self) -> None:
        for process in (self.server, self.worker):
            if process is not None:
                process.kill()
                process.wait()


def unit_etags(site: Site) -> dict[str, str]:
    """What the store has of each unit's result, by key: a result that is written again differs in its seconds."""
    server, prefix = services.shared_s3(), site.cli.environment["ADAPTORY_STORAGE__PREFIX"]
    pages = server.client().get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{prefix}work/")
    rows = [row for page in pages for row in page.get("Contents", ())]
    return {row["Key"]: row["ETag"] for row in rows if row["Size"] > len("{}")}
