"""Workers on hosts that lack something: the base, space on a disk, time; and the files that a job leaves behind."""

import errno
import shutil
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import pytest
import yaml
from sqlalchemy import delete, update

from composer.errors import RefusedOutput
from registry.database.engine import database_now
from registry.database.tables import Job, JobNeed
from registry.domain.jobs import needs
from registry.environment.settings import EngineSettings
from registry.errors import Unavailable
from registry.transfer.collect import collect
from registry.transfer.resources import Resources
from registry.worker.host import Host, sweep_work
from registry.worker.runner import JobKind, JobRun, end_unmet, run_one, run_worker
from registry.worker.steps import KINDS
from tests.doses import further, one_of_each
from tests.elapsed import let_elapse
from tests.eventually import eventually
from tests.scenarios.conftest import stock
from tests.scenarios.test_crashes import begin, resources_of, team, watched, write_recipe
from tests.scenarios.traces import api_of
from tests.scenarios.world import Cli, World

OUTAGES = {
    "full": (OSError(errno.ENOSPC, "No space left on device"), "disk_full"),
    "of a quota": (OSError(errno.EDQUOT, "Disk quota exceeded"), "disk_full"),
    "broken": (OSError(errno.EIO, "Input/output error"), "disk_error"),
    "full for an output": (RefusedOutput("disk_full", "The disk is full.", subject="x", next_step="y"), "disk_full"),
    "in another process's hands": (RefusedOutput("busy", "It is written.", subject="x", next_step="Wait."), "busy"),
    "behind a busy store": (Unavailable("store_busy", "The store is asked enough.", next_step="Wait."), "store_busy"),
}


@dataclass(frozen=True)
class Site:
    """A registry with a waiting composition, whose base is in its own directory."""

    cli: Cli
    base: Path
    resources: Resources
    elapsed: list[timedelta] = field(default_factory=lambda: [timedelta(0)])

    @property
    def job(self) -> dict[str, object]:
        job = self.cli.json("jobs", 1)
        return {"state": job["state"], "code": (job["error"] or {}).get("code")}

    @property
    def waits_for(self) -> str | None:
        return self.cli.json("jobs", 1)["waits_for"]

    @property
    def work(self) -> list[str]:
        return sorted(path.name for path in self.resources.work_directory.glob("composition-*"))

    def at(self, later: timedelta) -> Resources:
        """That long after the first work; called with ever later times."""
        let_elapse(self.resources, later - self.elapsed[-1])
        self.elapsed.append(later)
        return self.resources


@pytest.fixture
def site(embedded: Cli, world: World, tmp_path: Path) -> Generator[Site]:
    base = tmp_path / "base"
    shutil.copytree(world.base, base)
    own = World(base, world.adapters, world.suites)
    cli = team(stock(embedded, own), own)
    begin(cli, tmp_path)
    with resources_of(cli.environment) as resources:
        yield Site(cli, base, resources)


def replacing(name: str, step: Callable[[JobRun], None]) -> dict[str, JobKind]:
    """The real steps, but for one."""
    kind = KINDS["composition"]
    return {"composition": JobKind({**kind.steps, name: step}, kind.clean)}


def failing(name: str, error: Exception) -> dict[str, JobKind]:
    def step(_held: JobRun) -> None:
        raise error

    return replacing(name, step)


@pytest.mark.long
@pytest.mark.parametrize("disk", one_of_each(OUTAGES, lambda disk: type(OUTAGES[disk][0])))
def test_a_composition_waits_out_a_disk_that_is(disk: str, site: Site) -> None:
    error, code = OUTAGES[disk]
    assert run_one(site.resources, failing("merge", error), "first")
    assert site.job == {"state": "queued", "code": code}
    assert not run_one(site.resources, KINDS, "too early")
    assert run_one(site.at(timedelta(minutes=1)), KINDS, "second")
    assert site.job == {"state": "done", "code": None}


@pytest.mark.long
def test_a_disk_that_stays_full_ends_a_composition_at_its_third_attempt(site: Site) -> None:
    full = failing("combine", OUTAGES["full"][0])
    for minutes in (0, 1, 10):
        assert site.job["state"] == "queued"
        assert run_one(site.at(timedelta(minutes=minutes)), full, "worker")
    assert site.job == {"state": "failed", "code": "disk_full"}


def test_a_worker_without_the_base_leaves_a_composition_to_one_that_has_it(site: Site) -> None:
    away = site.base.rename(site.base.with_name("away"))
    for number in range(3):
        assert not run_one(site.resources, KINDS, f"without {number}", host=Host(site.resources, KINDS))
    assert site.job == {"state": "queued", "code": None}
    assert site.waits_for == "a worker that has the base tiny"
    away.rename(site.base)
    assert run_one(site.resources, KINDS, "with", host=Host(site.resources, KINDS))
    assert (site.job, site.waits_for) == ({"state": "done", "code": None}, None)


def test_a_composition_whose_base_no_worker_has_ends_after_an_hour_and_says_so(site: Site) -> None:
    site.base.rename(site.base.with_name("away"))
    for minutes, state in ((0, "queued"), (59, "queued"), (61, "failed")):
        later = site.at(timedelta(minutes=minutes))
        assert not run_one(later, KINDS, "worker", host=Host(later, KINDS))
        end_unmet(later)
        assert site.job["state"] == state, minutes
    error = site.cli.json("jobs", 1)["error"]
    assert error["code"] == "base_not_here"
    assert "No worker can find the base tiny at any location (file://" in error["detail"]
    assert "took the job within 60 minutes" in error["detail"]


def test_a_job_does_not_end_while_the_worker_that_has_its_base_is_busy(site: Site) -> None:
    with site.resources.write() as session:
        needs.announce(session, "busy", Host(site.resources, KINDS).offer(), database_now(session))
    away = site.base.rename(site.base.with_name("away"))
    for minutes in range(0, 180, 30):
        later = site.at(timedelta(minutes=minutes))
        away.rename(site.base)
        with later.write() as session:
            needs.announce(session, "busy", Host(later, KINDS).offer(), database_now(session))
        site.base.rename(away)
        assert not run_one(later, KINDS, "lacking", host=Host(later, KINDS))
        end_unmet(later)
    assert site.job["state"] == "queued"
    for minutes, state in ((200, "queued"), (215, "failed")):  # the other one was last seen after 150
        later = site.at(timedelta(minutes=minutes))
        assert not run_one(later, KINDS, "lacking", host=Host(later, KINDS))
        end_unmet(later)
        assert site.job["state"] == state


def test_a_composition_that_no_worker_can_take_is_cancelled_at_once(site: Site) -> None:
    assert run_one(site.resources, failing("combine", OUTAGES["full"][0]), "first")
    site.base.rename(site.base.with_name("away"))
    site.cli.ok("cancel", 1)
    if site.job["state"] == "queued":
        assert run_one(site.resources, KINDS, "worker", host=Host(site.resources, KINDS))
    assert site.job == {"state": "cancelled", "code": None}


def test_a_job_waits_for_a_device_with_its_memory_and_may_ask_for_less(site: Site, tmp_path: Path) -> None:
    needed = site.cli.json("jobs", 1)["memory_bytes"]
    assert needed == site.cli.json("base", "show", "tiny")["size_bytes"], "an evaluation loads it"
    small = replace(site.resources, settings=site.resources.settings.model_copy(update={"device_memory_bytes": 1}))
    assert not run_one(small, KINDS, "small", host=Host(small, KINDS))
    on_ray = small.settings.model_copy(update={"device_memory_bytes": None, "engine": EngineSettings(kind="ray")})
    assert Host(replace(small, settings=on_ray), KINDS).offer().memory_bytes > 10**15, "its nodes load the models"
    assert site.waits_for == f"a worker that has {needed / 1e6:,.1f} MB of device memory"
    with api_of(site.cli) as api:
        recipe = yaml.safe_load(write_recipe(tmp_path).read_text())
        recipe |= {"adapter": "acme/other:1.0.0", "model": "acme/other-merged:1.0.0"}
        merged = api.post("/v1/compositions", {"recipe": recipe, "memory_bytes": 1})["job"]
    assert run_one(small, KINDS, "small", host=Host(small, KINDS))
    assert site.cli.json("jobs", merged)["state"] == "done"
    site.at(timedelta(minutes=61))
    assert not run_one(small, KINDS, "small", host=Host(small, KINDS))
    end_unmet(small)
    assert site.job == {"state": "refused", "code": "device_too_small"}


@pytest.mark.long
def test_a_job_of_an_older_version_is_taken_by_a_worker_that_has_what_it_needs(site: Site) -> None:
    with site.resources.write() as session:
        session.execute(delete(JobNeed))
        session.execute(update(Job).values(memory_bytes=None))
    assert site.cli.json("jobs", 1)["memory_bytes"] is None
    away = site.base.rename(site.base.with_name("away"))
    assert not run_one(site.resources, KINDS, "without", host=Host(site.resources, KINDS))
    assert site.waits_for == "a worker that has the base tiny"
    away.rename(site.base)
    assert run_one(site.resources, KINDS, "with", host=Host(site.resources, KINDS))
    assert site.job["state"] == "done"


def test_a_job_of_a_newer_version_is_left_to_its_workers(site: Site) -> None:
    with site.resources.write() as session:
        session.add(JobNeed(job_id=1, need="enclave:sealed"))
    for later in (site.resources, site.at(timedelta(days=1))):
        assert not run_one(later, KINDS, "worker", host=Host(later, KINDS))
        end_unmet(later)
        assert site.job["state"] == "queued"
    assert site.waits_for == "a worker that has enclave:sealed"


@pytest.mark.long
def test_the_command_that_does_the_work_itself_says_at_once_that_the_base_is_not_here(
    site: Site, tmp_path: Path
) -> None:
    site.cli.ok("cancel", 1)
    site.base.rename(site.base.with_name("away"))
    refused = site.cli("compose", write_recipe(tmp_path))
    assert refused.code == 3
    assert "cannot find the base" in refused.err
    assert "adaptory base add DIR" in refused.err


@pytest.mark.long
def test_what_lies_on_a_host_that_another_took_a_composition_from_goes_once_that_has_ended(
    site: Site, tmp_path: Path
) -> None:
    away = Unavailable("store_unavailable", "The store is away.", next_step="Wait.")
    assert run_one(site.resources, failing("publish", away), "first")
    assert site.work == ["composition-1"]
    assert sweep_work(site.resources) == 0, "the next attempt goes on with it"
    assert collect(site.resources, grace=timedelta(0)).leftovers == 0
    other = tmp_path / "other"
    other.mkdir()
    assert run_one(replace(site.at(timedelta(minutes=1)), work_directory=other), KINDS, "second")
    assert (site.job["state"], site.work, list(other.iterdir())) == ("done", ["composition-1"], [])
    assert sweep_work(site.resources) == 1
    assert site.work == []


def test_a_worker_removes_what_other_hosts_have_ended_and_nothing_that_is_not_its_own(site: Site) -> None:
    site.cli.ok("cancel", 1)
    for name in ("composition-1", "composition-999", "composition-mine", "other"):
        (site.resources.work_directory / name / "model").mkdir(parents=True)
    stop = threading.Event()
    worker = threading.Thread(target=run_worker, args=(site.resources, KINDS, stop))
    worker.start()
    try:
        eventually(lambda: site.work == ["composition-mine"], within_s=30)
    finally:
        stop.set()
        worker.join()
    assert (site.resources.work_directory / "other" / "model").is_dir()


@pytest.mark.long
@pytest.mark.parametrize("name", ["merge", *further("evaluate", "check", "combine")])
def test_a_stopped_step_gives_its_job_back_before_it_has_read_or_measured_all(name: str, site: Site) -> None:
    stop, ended = threading.Event(), list[str]()
    step = KINDS["composition"].steps[name]

    def stopped(held: JobRun) -> None:
        stop.set()
        step(held)
        ended.append(name)

    assert run_one(site.resources, replacing(name, stopped), "first", stop)
    assert (site.job["state"], ended) == ("queued", [])
    seen: list[str] = []
    assert run_one(site.resources, watched(seen), "second")
    assert (site.job["state"], seen[0]) == ("done", name)


@pytest.mark.long
def test_a_suite_that_is_replaced_while_the_candidate_is_measured_fails_its_gate(
    sql_and_support: Cli, world: World, tmp_path: Path
) -> None:
    cli = sql_and_support
    cli.ok("eval", "tiny", "--suite", "guard-exact")
    gates = ["guard-exact.nll <= 1000", "guard-exact.nll within 1000 of inputs", "sql-exact.nll <= 1000"]
    recipe = yaml.safe_load(write_recipe(tmp_path).read_text()) | {"gates": gates}
    content = yaml.safe_load(world.suites["guard"].read_text())
    content["examples"] = [{"prompt": "new", "completion": "other"}]
    (tmp_path / "guard.yaml").write_text(yaml.safe_dump(content))

    def replaced(held: JobRun) -> None:
        KINDS["composition"].steps["evaluate"](held)
        cli.ok("suite", "add", tmp_path / "guard.yaml")
        cli.ok("eval", "tiny", "--suite", "guard-exact")

    with resources_of(cli.environment) as resources, api_of(cli) as api:
        api.post("/v1/compositions", {"recipe": recipe})
        assert run_one(resources, replacing("evaluate", replaced), "worker")
    job = cli.json("jobs", 1)
    assert (job["state"], job["error"]["code"]) == ("refused", "gate_failed")
    assert [row["passed"] for row in job["error"]["findings"]] == [False, False, True]
    assert "Compose again: guard-exact changed" in job["error"]["next"]
