"""Finished jobs are removed after a time, but not if anything that stays refers to them."""

from collections.abc import Generator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import yaml

from registry.transfer.collect import collect
from registry.transfer.resources import Resources
from registry.worker.runner import run_one
from registry.worker.steps import KINDS
from tests.scenarios.test_crashes import begin, resources_of, write_recipe
from tests.scenarios.traces import api_of
from tests.scenarios.world import Cli, World


@pytest.fixture
def resources(sql_and_support: Cli, world: World, tmp_path: Path) -> Generator[Resources]:
    """The resources of a registry whose jobs 1 to 3 have ended: a composition that published, an evaluation, and a
    plan; 4 waits."""
    cli = sql_and_support
    begin(cli, tmp_path)
    recipe = yaml.safe_load(write_recipe(tmp_path).read_text())
    with resources_of(cli.environment) as opened:
        with api_of(cli) as api:
            api.post("/v1/evaluations", {"releases": ["acme/sql:1.0.0"], "suites": ["sql-exact"]})
            for _ in range(2):
                api.post("/v1/compositions", {"recipe": {**recipe, "evaluate": []}, "plan": True})
        for _ in range(3):
            assert run_one(opened, KINDS, "worker")
        yield opened


def test_a_job_that_ended_long_ago_goes_unless_a_release_was_made_by_it(
    resources: Resources, sql_and_support: Cli
) -> None:
    cli = sql_and_support
    lineage, scores = cli.json("show", "acme/both:1.0.0"), cli.json("show", "acme/sql:1.0.0")["scores"]
    assert scores, "the evaluation recorded some"
    assert [job["state"] for job in cli.json("jobs")["items"]] == ["queued", "done", "done", "done"]
    days = timedelta(days=resources.settings.job_retention_days)
    soon = replace(resources, clock=lambda: resources.clock() + days - timedelta(hours=1))
    assert collect(soon, grace=timedelta(0)).jobs == 0
    later = replace(resources, clock=lambda: resources.clock() + days + timedelta(hours=1))
    assert collect(later, grace=timedelta(0), dry_run=True).jobs == 2
    assert len(cli.json("jobs")["items"]) == 4
    assert collect(later, grace=timedelta(0)).jobs == 2
    assert [(job["id"], job["state"]) for job in cli.json("jobs")["items"]] == [(4, "queued"), (1, "done")]
    assert cli.json("show", "acme/both:1.0.0") == lineage
    assert cli.json("show", "acme/sql:1.0.0")["scores"] == scores
    with api_of(cli) as api:
        assert api.get("/v1/compositions/1")["state"] == "done"
    for job in (2, 3):
        assert cli("jobs", job).code == 3
    acts = cli.json("audit")["items"]
    assert [row["subject"] for row in acts if row["act"] == "job:expire"] == ["job/3", "job/2"]
    assert {"evaluation:request", "composition:create"} <= {row["act"] for row in acts}, "what was asked for stays"
    assert cli.json("fsck")["clean"]
    assert run_one(resources, KINDS, "worker"), "what waits is still run"
