"""Jobs whose units run on two Ray nodes, with a real S3 server and PostgreSQL: the same results as in one process."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from registry.worker.engine.ray import base_resource
from tests import services
from tests.engine.cluster import REPOSITORY, RayCluster
from tests.s3_server import BUCKET
from tests.scenarios.conftest import USER, Templates, templates, world
from tests.scenarios.test_compositions import release_all, write_recipe
from tests.scenarios.world import Cli, World

__all__ = ["templates", "world"]  # fixtures

LOOSE = {"thresholds": {"probe_loss": 100, "probe_answers": 0, "probe_guard": 100}}
INPUTS = [{"adapter": "acme/sql@prod", "suite": "sql-exact"}, {"adapter": "acme/support", "suite": "support-exact"}]


@dataclass(frozen=True)
class Site:
    """A registry with two adapters, and a cluster whose nodes share its store."""

    cli: Cli
    cluster: RayCluster

    def on_cluster(self, *words: object) -> Any:
        """The output of a command in a process of its own, which is the driver."""
        environ = {"PATH": "/usr/bin:/bin", **self.cli.environment, **self.cluster.driver_environ}
        command = [sys.executable, "-m", "registry.cli.start", *map(str, words), "--json"]
        ran = subprocess.run(
            command, env=environ, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False
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
        for _ in range(2):
            cluster.start(resources=json.dumps({base_resource(digest): 1}))
        yield Site(cli, cluster)
    finally:
        cluster.stop()


def test_a_search_and_an_evaluation_on_two_nodes_give_what_one_process_gives(site: Site, tmp_path: Path) -> None:
    def recipe(version: str) -> Path:
        directory = tmp_path / version
        directory.mkdir()
        outputs = {"adapter": f"acme/assistant:{version}", "model": f"acme/assistant-merged:{version}"}
        asked = {"optimize": {"search": 2, "confirm": 2}, "evaluate": ["sql-exact", "guard-exact"]}
        return write_recipe(directory, **{"inputs": INPUTS, "policy": LOOSE, "probe": 0, **asked, **outputs})

    here = site.cli.json("compose", recipe("1.0.0"))
    assert unit_results(site) == set()
    there = site.on_cluster("compose", recipe("1.1.0"))
    assert decided(there) == decided(here)
    for repository in ("acme/assistant", "acme/assistant-merged"):
        assert files_of(site, f"{repository}:1.1.0") == files_of(site, f"{repository}:1.0.0")
    assert len(unit_results(site)) > 20, "passes and slices, which the nodes wrote"


def decided(composition: Mapping[str, Any]) -> dict[str, Any]:
    """What does not depend on the version or on the time."""
    evidence = {k: v for k, v in composition["lock"]["optimized"].items() if k not in ("seconds", "run")}
    return {"evidence": evidence, "scores": composition["candidate_scores"], "gates": composition["gates"]}


def files_of(site: Site, release: str) -> dict[str, str]:
    """Digests by path. An adapter's note names its release."""
    return {file["path"]: file["sha256"] for file in site.cli.json("show", release)["files"]}


def unit_results(site: Site) -> set[str]:
    """The keys of finished units in the store."""
    server, prefix = services.shared_s3(), site.cli.environment["ADAPTORY_STORAGE__PREFIX"]
    pages = server.client().get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{prefix}work/")
    return {row["Key"] for page in pages for row in page.get("Contents", ())}
