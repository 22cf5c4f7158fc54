"""Processes that die: finished work stays finished, unfinished work leaves nothing wrong behind."""

import functools
import hashlib
import random
import shutil
import signal
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import httpx2
import pytest
import yaml

from registry.database.tables import Job
from registry.domain.compositions import compositions
from registry.environment.settings import Settings
from registry.transfer.resources import Resources, open_resources
from registry.worker import combine_units
from registry.worker.combine_units import COMBINE
from registry.worker.engine.opened import WorkerEngine
from registry.worker.engine.protocol import Needs
from registry.worker.engine.units import Count, Node, Result, Task, Unit
from registry.worker.merging import SHARD
from registry.worker.runner import JobKind, JobRun, run_one
from registry.worker.steps import KINDS
from tests.doses import further
from tests.elapsed import let_elapse
from tests.forked import start_command
from tests.scenarios import stored
from tests.scenarios.conftest import USER, stock
from tests.scenarios.traces import api_of, bytes_in_s3, home_of, keeps_blobs_in_s3, traces
from tests.scenarios.world import Cli, World, environment, own_environment, server

STEPS = list(compositions.STEPS)
LATER = timedelta(minutes=2)
"""Longer than a lease: by then the dead worker's job is anybody's."""


class Killed(BaseException):
    """Ends a worker as SIGKILL would, as far as rows and files can tell: nothing catches it, nothing is tidied."""


def write_recipe(directory: Path) -> Path:
    recipe = {
        "inputs": [{"adapter": "acme/sql:1.0.0", "weight": 0.5}, {"adapter": "acme/support:1.0.0", "weight": 0.5}],
        "method": "linear", "adapter": "acme/both:1.0.0", "model": "acme/merged:1.0.0", "probe": 0,
        "evaluate": ["sql-exact", "guard-exact"],
    }  # fmt: skip
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def team(cli: Cli, world: World) -> Cli:
    """Two adapters in a registry that knows their base."""
    for name in ("sql", "support"):
        cli.ok("push", world.adapters[name], f"acme/{name}:1.0.0", "--base", "tiny")
    return cli


@contextmanager
def resources_of(environ: Mapping[str, str], later: timedelta = timedelta(0)) -> Generator[Resources]:
    """The resources of the registry of this environment, this much later."""
    with environment(environ, ["adaptory"]):
        opened = open_resources(Settings())
    let_elapse(opened, later)
    try:
        yield replace(opened, clock=lambda: opened.clock() + later)
    finally:
        opened.close()


def watched(seen: list[str], after: Callable[[str], None] = lambda _name: None) -> dict[str, JobKind]:
    """The real steps, recording each that ran; `after` runs when the step has done its work but has not recorded it
    yet."""

    def wrap(name: str, step: Callable[[JobRun], None]) -> Callable[[JobRun], None]:
        def run(held: JobRun) -> None:
            step(held)
            seen.append(name)
            after(name)

        return run

    kind = KINDS["composition"]
    return {"composition": JobKind({name: wrap(name, step) for name, step in kind.steps.items()}, kind.clean)}


def refuse_again(_node: Node, unit: Unit, _count: Count) -> Result:
    """Takes the place of a unit that the worker before has finished."""
    raise AssertionError(f"{unit.name} was made before")


def begin(cli: Cli, tmp_path: Path) -> None:
    """Enqueues the composition as a server would, without a worker beside it."""
    recipe = yaml.safe_load(write_recipe(tmp_path).read_text())
    with api_of(cli) as api:
        api.post("/v1/compositions", {"recipe": recipe, "plan": False})


@pytest.mark.parametrize("last", [STEPS[-1], *further(*STEPS[:-1])])
def test_a_worker_that_dies_before_it_notes_a_step_is_succeeded_by_one_that_ends_the_job_the_same(
    sql_and_support: Cli, tmp_path: Path, last: str
) -> None:
    cli, environ = sql_and_support, sql_and_support.environment
    begin(cli, tmp_path)
    first: list[str] = []

    def die(name: str) -> None:
        if name == last:
            raise Killed

    with resources_of(environ) as resources, pytest.raises(Killed):
        run_one(resources, watched(first, die), "first")
    assert first == STEPS[: STEPS.index(last) + 1]
    published = {release for release in traces(cli).releases if "both" in release or "merged" in release}
    assert published == ({"acme/both:1.0.0", "acme/merged:1.0.0"} if last == "publish" else set())

    with resources_of(environ) as resources:
        assert not run_one(resources, watched([]), "too early"), "the lease has not run out"
    second: list[str] = []
    with resources_of(environ, LATER) as resources:
        assert run_one(resources, watched(second), "second")
        assert not run_one(resources, watched([]), "third"), "it is done"
    assert second == STEPS[STEPS.index(last) :], "steps that were noted as done are not redone"

    done = cli.json("jobs", "1")
    assert (done["state"], [step["state"] for step in done["steps"]]) == ("done", ["done"] * len(STEPS))
    assert traces(cli).work == frozenset()
    commits = {name: cli.json("show", f"acme/{name}:1.0.0")["commit"] for name in ("both", "merged")}
    again = cli.json("compose", write_recipe(tmp_path))
    assert {row["repository"].removeprefix("acme/"): row["commit"] for row in again["results"]} == commits, (
        "an undisturbed run gives the same bytes"
    )


@pytest.mark.long
def test_a_search_whose_choice_is_locked_is_not_repeated_by_the_next_worker(
    sql_and_support: Cli, tmp_path: Path
) -> None:
    cli, environ = sql_and_support, sql_and_support.environment
    recipe = yaml.safe_load(write_recipe(tmp_path).read_text())
    inputs = [one | {"suite": f"{name}-exact"} for name, one in zip(("sql", "support"), recipe["inputs"], strict=True)]
    loose = {"thresholds": {"probe_loss": 100, "probe_answers": 0, "probe_guard": 100}}
    searched = {"inputs": inputs, "policy": loose, "optimize": {"search": 2, "confirm": 2}}
    with api_of(cli) as api:
        started = api.post("/v1/compositions", {"recipe": recipe | searched, "plan": True})

    def die(name: str) -> None:
        raise Killed(name)

    with resources_of(environ) as resources, pytest.raises(Killed, match="optimize"):
        run_one(resources, watched([], die), "first")
    locked = cli.json("jobs", str(started["id"]))
    seen: list[str] = []
    with resources_of(environ, LATER) as resources:
        journals = resources.settings.home / "cache" / "eval"
        next(journals.glob("*.jsonl")).unlink()  # a search that ran again would write it again
        assert run_one(resources, watched(seen), "second")
        assert seen == ["optimize", "check"]
        assert not list(journals.glob("*.jsonl"))
    assert locked["state"] == "running"
    with api_of(cli) as api:
        evidence = api.get(f"/v1/compositions/{started['id']}")["lock"]["optimized"]
    assert evidence["choice"]


@pytest.mark.long
def test_a_worker_that_dies_between_the_bytes_of_two_outputs_has_published_neither(
    sql_and_support: Cli, tmp_path: Path
) -> None:
    """The adapter's bytes are in the store and the model's are not: the next worker publishes both together."""
    cli, environ = sql_and_support, sql_and_support.environment
    begin(cli, tmp_path)

    class DyingEngine(WorkerEngine):
        """The engine, until the first shard of the model is made."""

        def map(self, task: Task, units: Sequence[Unit], needs: Needs, check: Count) -> Iterator[tuple[Unit, Result]]:
            if task.name == SHARD.name:
                raise Killed
            return super().map(task, units, needs, check)

    with resources_of(environ) as resources:
        engine = DyingEngine(resources.settings, resources.store)
        with closing(engine), pytest.raises(Killed):
            run_one(resources, KINDS, "first", engine=engine)
    assert not {"acme/both:1.0.0", "acme/merged:1.0.0"} & set(traces(cli).releases)
    second: list[str] = []
    with resources_of(environ, LATER) as resources:
        assert run_one(resources, watched(second), "second")
    assert second == ["merge", "publish"]
    assert {"acme/both:1.0.0", "acme/merged:1.0.0"} <= set(traces(cli).releases)
    assert len(cli.json("log", "acme/both")["items"]) == 1


@pytest.mark.long
def test_a_job_that_kills_every_worker_is_given_up(sql_and_support: Cli, tmp_path: Path) -> None:
    cli, environ = sql_and_support, sql_and_support.environment
    begin(cli, tmp_path)

    def die(_name: str) -> None:
        raise Killed

    for attempt in range(3):
        with resources_of(environ, attempt * LATER) as resources, pytest.raises(Killed):
            run_one(resources, watched([], die), f"worker {attempt}")
    with resources_of(environ, 3 * LATER) as resources:
        assert run_one(resources, watched([]), "fourth"), "it ends the job and cleans up after it"
    job = cli.json("jobs", "1")
    assert (job["state"], job["error"]["code"]) == ("failed", "worker_lost")
    assert not traces(cli).work


@pytest.mark.long
def test_a_command_does_its_own_job_and_leaves_those_of_others_to_workers_and_to_their_followers(
    sql_and_support: Cli, tmp_path: Path
) -> None:
    cli = sql_and_support
    begin(cli, tmp_path)
    cli.ok("compose", write_recipe(tmp_path), "--plan")
    assert [cli.json("jobs", job)["state"] for job in "12"] == ["queued", "done"]
    cli.ok("jobs", 1, "--follow")
    assert cli.json("jobs", 1)["state"] == "done"


@pytest.mark.long
def test_a_server_killed_in_the_middle_of_a_composition_does_not_lose_it(
    pairing: dict[str, str], world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "server"
    environ = {"ADAPTORY_USER": USER, **pairing}
    with server(home, **environ) as (url, process):
        cli = team(stock(Cli({"ADAPTORY_HOME": str(tmp_path / "home"), "ADAPTORY_URL": url}), world), world)
        started = cli.json("compose", write_recipe(tmp_path))
        states = wait_for(url, started["id"], lambda states: states["evaluate"] == "running")
        process.kill()
        process.join()
    assert (states["check"], states["combine"]) == ("done", "done")

    monkeypatch.setattr(combine_units, "COMBINE", replace(COMBINE, run=refuse_again))
    with server(home, **environ) as (url, _):
        cli = Cli({"ADAPTORY_HOME": str(tmp_path / "home"), "ADAPTORY_URL": url}, served_with=environ)
        assert set(traces(cli).releases) == {"acme/sql:1.0.0", "acme/support:1.0.0"}, "nothing is half published"
        assert cli.json("jobs", "1")["state"] == "running", "it is the dead worker's until its lease runs out"
        seen: list[str] = []
        with resources_of({"ADAPTORY_HOME": str(home), **environ}, LATER) as resources:
            assert run_one(resources, watched(seen), "successor")
        assert seen == ["evaluate", "gate", "merge", "publish"]
        assert cli.json("jobs", "1")["state"] == "done"
        assert {"acme/both:1.0.0", "acme/merged:1.0.0"} <= set(traces(cli).releases)


def wait_for(url: str, composition: int, enough: Callable[[dict[str, str]], bool]) -> dict[str, str]:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        document = httpx2.get(f"{url}/v1/compositions/{composition}", timeout=30).json()
        states = {step["name"]: step["state"] for step in document["steps"]}
        if enough(states):
            return states
        assert document["state"] in ("queued", "running"), document
        time.sleep(0.005)
    raise AssertionError(f"the composition never came that far: {states}")


HEAVY_BYTES = 12 << 20


def heavy_adapter(world: World, directory: Path, seed: int) -> Path:
    """An adapter with 12 MB beside it, so that a push can be killed in the middle."""
    shutil.copytree(world.adapters["sql"], directory)
    (directory / "tokenizer.json").write_bytes(random.Random(seed).randbytes(HEAVY_BYTES))
    return directory


def bytes_below(*directories: Path) -> int:
    total = 0
    for environ in directories:
        for path in environ.rglob("*"):
            with suppress(FileNotFoundError):  # it was moved into place meanwhile
                total += path.stat().st_size
    return total


def run_and_kill(cli: Cli, arguments: list[object], written_bytes: Callable[[], int], enough_bytes: int) -> bool:
    """`adaptory …` in a process of its own, killed as soon as it has written so much; whether it was still running."""
    log = Path(cli.environment["ADAPTORY_HOME"]).with_name("killed.log")
    before = written_bytes()
    process = start_command(arguments, own_environment(cli), log)
    while process.is_alive() and written_bytes() < before + enough_bytes:
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), log.read_text()
    return process.exitcode != 0


def assert_blobs_are_what_their_names_say(cli: Cli) -> None:
    for sha256 in traces(cli).blobs:
        assert hashlib.sha256(stored.read(cli, sha256)).hexdigest() == sha256


KILLS = [3, *further(6)]


def kill_points(seed: int, kills: int) -> list[int]:
    """The numbers of written bytes at the kill: from the first byte to nearly all."""
    chance = random.Random(seed)
    return [1, *(int(HEAVY_BYTES * chance.uniform(0.02, 0.98)) for _ in range(kills - 2)), HEAVY_BYTES]


@pytest.mark.parametrize("kills", KILLS)
def test_a_push_killed_at_any_moment_succeeds_when_it_is_repeated(
    stocked: Cli, world: World, tmp_path: Path, kills: int
) -> None:
    """In the embedded registry the killed client is the registry as well."""
    registry, killed = stocked, 0

    def written_bytes() -> int:
        if keeps_blobs_in_s3(registry):
            return bytes_in_s3(registry)
        return bytes_below(home_of(registry) / "work", home_of(registry) / "store")

    for number, enough_bytes in enumerate(kill_points(11, kills), start=1):
        adapter = heavy_adapter(world, tmp_path / f"adapter-{number}", number)
        push: list[object] = ["push", adapter, f"acme/sql:1.{number}.0", "--base", "tiny"]
        killed += run_and_kill(registry, push, written_bytes, enough_bytes)
        assert_blobs_are_what_their_names_say(registry)
        release = registry.json(*push)["release"]
        assert {file["path"] for file in release["files"]} == {path.name for path in adapter.iterdir()}
    assert killed > kills / 2, "the kills came too late to mean anything"
    assert_blobs_are_what_their_names_say(registry)
    assert len(registry.json("log", "acme/sql")["items"]) == kills
    registry.ok("pull", f"acme/sql:1.{kills}.0", "-o", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (adapter / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("kills", KILLS)
def test_a_pull_killed_at_any_moment_leaves_a_whole_directory_or_none(
    stocked: Cli, world: World, tmp_path: Path, kills: int
) -> None:
    registry, adapter = stocked, heavy_adapter(world, tmp_path / "adapter", 0)
    registry.ok("push", adapter, "acme/sql:1.0.0", "--base", "tiny")
    expected = {path.name: path.read_bytes() for path in adapter.iterdir()}
    commit = registry.json("show", "acme/sql")["commit"]
    killed = 0
    for number, enough_bytes in enumerate(kill_points(12, kills), start=1):
        out = tmp_path / f"out-{number}"
        partial = tmp_path / f".out-{number}.{commit[:12]}.partial"
        # Not from the cache, whose files appear at once.
        shutil.rmtree(Path(registry.environment["ADAPTORY_HOME"]) / "cache", ignore_errors=True)
        written_bytes = functools.partial(bytes_below, partial, out)
        was_killed = run_and_kill(registry, ["pull", "acme/sql", "-o", out], written_bytes, enough_bytes)
        killed += was_killed
        assert was_killed or out.exists()
        registry.ok("pull", "acme/sql", "-o", out)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == expected
    assert killed > kills / 2, "the kills came too late to mean anything"
    assert {path.name for path in tmp_path.iterdir() if ".partial" in path.name} == set(), "a finished pull tidies up"


def test_a_pull_killed_before_it_has_tidied_up_is_tidied_by_the_next(
    stocked_embedded: Cli, world: World, tmp_path: Path
) -> None:
    cli, out = stocked_embedded, tmp_path / "out"
    cli.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny")
    cli.ok("pull", "acme/sql", "-o", out)
    left = tmp_path / f".out.{cli.json('show', 'acme/sql')['commit'][:12]}.partial"
    (left / "replaced").mkdir(parents=True)
    (left / "replaced" / "adapter_config.json").write_text("{}")
    cli.ok("pull", "acme/sql", "-o", out)
    assert [path.name for path in tmp_path.iterdir() if ".partial" in path.name] == []


def test_a_pull_never_trusts_what_an_earlier_one_left(stocked_embedded: Cli, world: World, tmp_path: Path) -> None:
    cli = stocked_embedded
    cli.ok("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny")
    weights = (world.adapters["sql"] / "adapter_model.safetensors").read_bytes()
    commit = cli.json("show", "acme/sql")["commit"]
    for name, left in (("short", weights[:1000]), ("long", weights * 2), ("other", b"x" * len(weights))):
        files = tmp_path / f".{name}.{commit[:12]}.partial" / "files"
        files.mkdir(parents=True)
        (files / "adapter_model.safetensors").write_bytes(left)
        (files / "adapter_config.json").write_bytes(b"{" * 100_000)
        cli.ok("pull", "acme/sql", "-o", tmp_path / name)
        assert (tmp_path / name / "adapter_model.safetensors").read_bytes() == weights
        assert not files.exists()


def test_a_damaged_blob_is_never_given_out_as_if_it_were_whole(
    stocked_embedded: Cli, world: World, tmp_path: Path
) -> None:
    cli = stocked_embedded
    release = cli.json("push", world.adapters["sql"], "acme/sql:1.0.0", "--base", "tiny")["release"]
    digest = next(file["sha256"] for file in release["files"] if file["path"].endswith(".safetensors"))
    stored.damage(cli, digest)
    refused = cli("pull", "acme/sql", "-o", tmp_path / "out")
    assert refused.code == 7
    assert not (tmp_path / "out").exists()
    refused = cli("compose", write_single(tmp_path))
    assert (refused.code, digest[:12] in refused.err) == (7, True)
    assert traces(cli).releases == ("acme/sql:1.0.0",)


def write_single(directory: Path) -> Path:
    path = directory / "single.yaml"
    path.write_text(yaml.safe_dump({"inputs": ["acme/sql"], "method": "stack", "adapter": "acme/x:1.0.0", "probe": 0}))
    return path


@pytest.mark.long
def test_a_silent_worker_that_comes_back_cannot_end_a_job_that_another_has_taken(
    sql_and_support: Cli, tmp_path: Path
) -> None:
    """The first worker sleeps through its lease in `combine`; the second takes over and finishes."""
    cli, environ = sql_and_support, sql_and_support.environment
    begin(cli, tmp_path)
    first: list[str] = []
    second: list[str] = []

    def oversleep(name: str) -> None:
        if name == "combine":
            with resources_of(environ, LATER) as later:
                assert run_one(later, watched(second), "second")

    with resources_of(environ) as resources:
        run_one(resources, watched(first, oversleep), "first")
    assert (first, second) == (["check", "combine"], STEPS[1:]), "the first lets go as soon as it looks"
    with resources_of(environ) as resources, resources.read() as session:
        job = session.get_one(Job, 1)
        assert (job.state, job.attempts) == ("done", 2)
        assert {step["state"] for step in job.steps} == {"done"}
    assert {"acme/both:1.0.0", "acme/merged:1.0.0"} <= set(traces(cli).releases)
