"""Workers that stop, return jobs, or resume elsewhere; and jobs that they refuse to begin."""

import shutil
import sqlite3
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest
import yaml
from safetensors.torch import load_file, save_file

from registry.cli.operations.operations import WorkerJobs
from registry.domain.jobs import queue
from registry.errors import NotFound, Unavailable
from registry.worker import combine_units, merging, runner
from registry.worker.combine_units import COMBINE
from registry.worker.engine.opened import WorkerEngine
from registry.worker.engine.units import Count, Node, Result, Unit
from registry.worker.merging import SHARD
from registry.worker.runner import JobRun, run_one
from registry.worker.steps import KINDS
from tests import services
from tests.doses import further
from tests.eventually import eventually
from tests.forked import start_command
from tests.scenarios.conftest import stock
from tests.scenarios.test_crashes import (
    LATER,
    Killed,
    begin,
    refuse_again,
    resources_of,
    team,
    watched,
    write_recipe,
)
from tests.scenarios.traces import home_of, traces
from tests.scenarios.world import Cli, World, own_environment


@pytest.mark.parametrize("step", ["merge", *further("check", "evaluate")])
def test_a_cancelled_composition_publishes_nothing_and_leaves_nothing(
    sql_and_support: Cli, tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "BEAT_S", 0.5)
    cli = sql_and_support
    begin(cli, tmp_path)
    before = traces(cli)

    def cancel(name: str) -> None:
        if name == step:
            cli.ok("cancel", 1)
            time.sleep(2)  # the worker learns of it by a beat

    with resources_of(cli.environment) as resources:
        assert run_one(resources, watched([], cancel), "worker")
    assert cli.json("jobs", 1)["state"] == "cancelled"
    after = traces(cli)
    assert (after.releases, after.blobs, after.work) == (before.releases, before.blobs, before.work)
    assert cli("cancel", 1).code == 4


@pytest.mark.on("PostgreSQL")
def test_a_waiting_composition_is_cancelled_at_once(sql_and_support: Cli, tmp_path: Path) -> None:
    cli = sql_and_support
    begin(cli, tmp_path)
    assert cli.json("cancel", 1)["state"] == "cancelled"
    with resources_of(cli.environment) as resources:
        assert not run_one(resources, watched([]), "worker")


def test_a_worker_leaves_jobs_of_other_kinds_than_its_own(sql_and_support: Cli, tmp_path: Path) -> None:
    cli = sql_and_support
    begin(cli, tmp_path)
    assert {kind.value for kind in WorkerJobs} == KINDS.keys(), "every kind can be named"
    with resources_of(cli.environment) as resources:
        others = {name: kind for name, kind in KINDS.items() if name != "composition"}
        assert not run_one(resources, others, "worker")
        assert cli.json("jobs", 1)["state"] == "queued"
        assert run_one(resources, {"composition": KINDS["composition"]}, "worker")
    assert cli.json("jobs", 1)["state"] == "done"


def test_a_stopped_worker_hands_its_job_back_without_a_wait(sql_and_support: Cli, tmp_path: Path) -> None:
    cli, stop = sql_and_support, threading.Event()
    begin(cli, tmp_path)
    first: list[str] = []
    second: list[str] = []

    def halt(name: str) -> None:
        if name == "combine":
            stop.set()

    with resources_of(cli.environment) as resources:
        assert run_one(resources, watched(first, halt), "first", stop)
        assert cli.json("jobs", 1)["state"] == "queued"
        assert run_one(resources, watched(second), "second")
    assert cli.json("jobs", 1)["state"] == "done"
    assert (first, second) == (["check", "combine"], ["evaluate", "gate", "merge", "publish"])


def test_code_that_exits_the_process_ends_the_worker_instead_of_silencing_it(
    sql_and_support: Cli, tmp_path: Path
) -> None:
    cli, caught = sql_and_support, list[BaseException]()
    begin(cli, tmp_path)

    def leave(_name: str) -> None:
        sys.exit(3)

    def work() -> None:
        try:
            runner.run_worker(resources, watched([], leave), threading.Event())
        except SystemExit as error:
            caught.append(error)

    with resources_of(cli.environment) as resources:
        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        worker.join(30)
        assert not worker.is_alive()
    assert [error.args for error in caught] == [(3,)]


class OnceThere(threading.Event):
    """Set by another process, which makes a file."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def is_set(self) -> bool:
        return self._path.exists()


def note_begun(node: Node, unit: Unit, count: Count) -> Result:
    (node.settings.home_directory / "begun").touch()
    return SHARD.run(node, unit, count)


@pytest.mark.long
def test_a_worker_stopped_in_a_merge_leaves_what_is_finished_to_the_next_one(
    sql_and_support: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli, second = sql_and_support, list[str]()
    begin(cli, tmp_path)
    stop = OnceThere(home_of(cli) / "begun")
    with resources_of(cli.environment) as resources:
        with monkeypatch.context() as patched:
            patched.setattr(merging, "SHARD", replace(SHARD, run=note_begun))
            assert run_one(resources, watched([]), "first", stop)
        assert cli.json("jobs", 1)["state"] == "queued"
        monkeypatch.setattr(combine_units, "COMBINE", replace(COMBINE, run=refuse_again))
        assert run_one(resources, watched(second), "second")
    assert (second, cli.json("jobs", 1)["state"]) == (["merge", "publish"], "done")


def test_a_database_that_is_locked_for_a_moment_ends_no_step(on_disk: Cli) -> None:
    """A merge's progress can be recorded later; otherwise all finished work would be lost."""
    on_disk.ok("list")
    environ = {**on_disk.environment, "ADAPTORY_DATABASE_TIMEOUT_S": "0.2"}
    with resources_of(environ) as resources:
        held = JobRun(
            resources, "worker", 1, threading.Event(), engine=WorkerEngine(resources.settings, resources.store)
        )
        other = sqlite3.connect(Path(environ["ADAPTORY_HOME"]) / "registry.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(Unavailable):
            held.finish_step()
        held.progress(0.5)
        other.close()
        with pytest.raises(NotFound, match="Job 1 does not exist"):  # it is retried
            held.progress(0.9)


@pytest.mark.long
def test_a_worker_process_that_is_terminated_hands_its_job_back(sql_and_support: Cli, tmp_path: Path) -> None:
    cli = sql_and_support
    begin(cli, tmp_path)
    second: list[str] = []
    with resources_of(cli.environment) as resources:

        def state() -> str:
            with resources.read() as session:
                return queue.find(session, 1).state

        worker = start_command(["worker"], own_environment(cli), tmp_path / "worker.log")
        try:
            eventually(lambda: state() == "running", every_s=0.01)
            worker.terminate()
            worker.join(60)
            assert worker.exitcode == 0
        finally:
            worker.kill()
        assert state() == "queued"
        assert run_one(resources, watched(second), "second"), "it is taken at once, without waiting for a lease"
    assert second[-1] == "publish"


def test_a_worker_counts_its_jobs_and_steps_for_those_who_have_a_token(sql_and_support: Cli, tmp_path: Path) -> None:
    cli = sql_and_support
    begin(cli, tmp_path)
    cli.ok("namespace", "grant", "*", "mia", "admin")
    token = cli.json("token", "create", "--user", "mia")["token"]
    port = services.free_port()
    environment = own_environment(cli) | {"ADAPTORY_ACCESS": "tokens"}
    worker = start_command(["worker", "--metrics", port], environment, tmp_path / "worker.log")

    def ask(path: str, **headers: str) -> httpx2.Response:
        return httpx2.get(f"http://127.0.0.1:{port}{path}", headers=headers)

    try:
        eventually(lambda: cli.json("jobs", 1)["state"] == "done", every_s=0.1)
        assert ask("/healthz").json() == {"status": "ok"}
        assert (ask("/metrics").status_code, ask("/v1/whoami").status_code) == (401, 404)
        text = ask("/metrics", Authorization=f"Bearer {token}").text
    finally:
        worker.kill()
        worker.join()
    assert 'adaptory_worker_job_seconds_count{kind="composition",state="done"} 1.0' in text
    assert 'adaptory_worker_step_seconds_count{kind="composition",state="done",step="publish"} 1.0' in text
    assert "acme" not in text
    assert cli("worker", "--metrics", "here").code == 2


@pytest.mark.long
def test_a_worker_on_another_host_makes_again_what_lies_on_the_dead_ones_disk(
    sql_and_support: Cli, tmp_path: Path
) -> None:
    cli = sql_and_support
    work = Path(cli.environment["ADAPTORY_HOME"]) / "work"
    begin(cli, tmp_path)

    def die(name: str) -> None:
        if name == "merge":
            raise Killed

    with resources_of(cli.environment) as resources, pytest.raises(Killed):
        run_one(resources, watched([], die), "first")
    shutil.rmtree(work)
    work.mkdir()
    with resources_of(cli.environment, LATER) as resources:
        assert run_one(resources, watched([]), "second")
    assert cli.json("jobs", 1)["state"] == "done"
    assert {"acme/both:1.0.0", "acme/merged:1.0.0"} <= set(traces(cli).releases)


@pytest.mark.long
def test_a_base_that_changed_on_disk_is_neither_merged_nor_scored(embedded: Cli, world: World, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(world.base, base)
    moved = World(base, world.adapters, world.suites)
    cli = team(stock(embedded, moved), moved)
    shard = min(base.glob("*.safetensors"))
    save_file({name: tensor * 2 for name, tensor in load_file(shard).items()}, shard, metadata={"format": "pt"})
    composed = cli("compose", write_recipe(tmp_path))
    assert composed.code == 1
    assert "does not hold the weights of the base" in composed.err
    scored = cli("eval", "acme/sql", "--suite", "sql-exact")
    assert scored.code == 1
    assert cli.json("show", "acme/sql")["scores"] == []


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"model": "acme/both:2.0.0"}, 2, "separate repositories"),
        ({"model": "acme/sql:2.0.0"}, 4, "holds adapter releases"),
        ({"gates": ["guard-exact.nll within 0 of served"]}, 2, "has no channel"),
        ({"gates": ["support-exact.nll <= 9"]}, 2, "does not evaluate support-exact"),
    ],
)
def test_a_recipe_that_cannot_end_well_is_refused_before_any_work(
    sql_and_support: Cli, tmp_path: Path, change: dict[str, object], code: int, words: str
) -> None:
    cli = sql_and_support
    recipe = yaml.safe_load(write_recipe(tmp_path).read_text()) | change
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    refused = cli("compose", tmp_path / "recipe.yaml")
    assert refused.code == code, refused.err
    assert words in refused.err
    assert cli.json("jobs")["items"] == []


@pytest.mark.long
def test_the_probe_measures_the_weights_that_the_method_ends_up_with(sql_and_support: Cli, tmp_path: Path) -> None:
    cli = sql_and_support
    plain = {
        "inputs": [
            {"adapter": "acme/sql", "weight": 0.5, "suite": "sql-exact"},
            {"adapter": "acme/support", "weight": 0.5, "suite": "support-exact"},
        ],
        "method": "linear", "probe": 2,
    }  # fmt: skip
    doubled = [entry | {"weight": 1.0} for entry in plain["inputs"]]
    risks = []
    for recipe in (plain, plain | {"inputs": doubled, "settings": {"normalize": True}}):
        (tmp_path / "plan.yaml").write_text(yaml.safe_dump(recipe))
        report = cli.json("compose", tmp_path / "plan.yaml", "--plan")["conflicts"]
        assert report["pairs"][0]["evidence"] == "probe"
        risks.append(report["pairs"][0]["risk"])
    assert risks[0] == pytest.approx(risks[1], abs=1e-6)


@pytest.mark.on("SQLite")
def test_a_file_whose_name_needs_quoting_is_pushed_and_pulled(stocked: Cli, world: World, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(world.adapters["sql"], adapter)
    (adapter / "notes #1 100% & more.md").write_text("odd, but legal")
    stocked.ok("push", adapter, "acme/sql:1.0.0", "--base", "tiny", "--include", "notes*")
    stocked.ok("pull", "acme/sql:1.0.0", "-o", tmp_path / "out")
    assert (tmp_path / "out" / "notes #1 100% & more.md").read_text() == "odd, but legal"
