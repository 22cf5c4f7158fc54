"""The cost of the engine, and the gain of a second node: units that do nothing, a search on one node and on two, and
the growth curve to 100 shards and 16 nodes.

The nodes are processes of this machine with one core each. A search's units are passes of a few examples each, so that
every round waits for its slowest. The growth is simulated: its assumptions are printed with it.
"""

import heapq
import json
import os
import random
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from statistics import median
from tempfile import mkdtemp
from typing import Any

from benchmarks import harness
from composer.deltas.variants.load import load_deltas
from composer.evaluation.model import load_model
from composer.formats.checkpoints.checkpoint import open_checkpoint
from composer.formats.checkpoints.hashing import hash_checkpoint, hash_file
from composer.formats.recipes.suite import parse_suite
from composer.optimize.optimize import optimize
from composer.optimize.problem import SearchEffort, SearchMember, SearchProblem
from registry.environment.settings import EngineSettings, LocalStorage, Settings
from registry.formats.manifest import ManifestFile
from registry.formats.references import Digest
from registry.transfer.resources import open_store
from registry.worker.engine.opened import WorkerEngine
from registry.worker.engine.protocol import Needs
from registry.worker.engine.ray import base_resource
from registry.worker.engine.units import BaseHints
from registry.worker.node_files import share_architecture, to_rows
from registry.worker.node_models import base_hints
from registry.worker.pass_units import Passes, how_to_search
from tests.engine import counted
from tests.engine.cluster import RayCluster

EXAMPLES = Path("examples")
TASKS = [
    ("sql-migration", "sql-exact"),
    ("terraform-review", "terraform-exact"),
    ("support-macros", "support-exact"),
]
SHARDS, NODES = 100, (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Held:
    """The parts of a job that a search needs."""

    engine: WorkerEngine

    def check(self, _done: int = 0) -> None:
        """Nobody stops a benchmark."""


@dataclass(frozen=True)
class Times:
    """The times of one run: its seconds with start and plan, and the sum of its units' seconds."""

    wall_s: float
    units_s: float
    units: int

    def share(self, runners: int) -> float:
        """The share of the processes' time spent outside units: start, the engine's cost, waiting at ends of rounds."""
        return 1 - self.units_s / (runners * self.wall_s)


def main() -> None:
    chosen = harness.options(__doc__, rounds=1)
    harness.announce("engine", "ray", "torch", "transformers")
    home = Path(mkdtemp(prefix="engine-"))
    try:
        digest = hash_checkpoint(open_checkpoint(chosen.base)).weights_digest
        with _cluster(home, digest) as cluster:
            engines = {runners: _engine(home, cluster, runners) for runners in (1, 2)}
            try:
                cost = _units_that_do_nothing(engines[2], home, 50 if chosen.quick else 500)
                for thorough in (False, True):
                    _search(chosen, home, digest, engines, thorough=thorough)
            finally:
                engines[1].close()  # Ray ends a process whose cluster has stopped
        _growth(cost)
    finally:
        shutil.rmtree(home)


@contextmanager
def _cluster(home: Path, digest: str) -> Iterator[RayCluster]:
    started = RayCluster({"ADAPTORY_HOME": str(home)}, resources=json.dumps({base_resource(digest): 1}))
    try:
        started.start(cpus=0)
        for core in (0, 1):
            node = started.start(cpus=1)
            os.sched_setaffinity(node.process.pid, {core})
            for child in node.family:
                os.sched_setaffinity(child.pid, {core})
        yield started
    finally:
        started.stop()


def _engine(home: Path, cluster: RayCluster, runners: int) -> WorkerEngine:
    known = EngineSettings(kind="ray", address=cluster.address, token_path=cluster.token_path, runners=runners)
    settings = Settings(home=home, storage=LocalStorage(), engine=known)
    return WorkerEngine(settings, open_store(settings, None))


def _units_that_do_nothing(engine: WorkerEngine, home: Path, count: int) -> float:
    """Prints and returns the seconds of a unit that does nothing, kept result included, beside a plain call."""
    started = time.monotonic()
    list(engine.map(counted.DOUBLE, counted.units(1, home / "journal"), Needs(), Held(engine).check))
    first_s = time.monotonic() - started
    units = counted.units(count, home / "journal")[1:]
    started = time.monotonic()
    list(engine.map(counted.DOUBLE, units, Needs(), Held(engine).check))
    each_s = (time.monotonic() - started) / len(units)
    started = time.monotonic()
    list(engine.map(counted.DOUBLE, units, Needs(), Held(engine).check))
    kept_s = (time.monotonic() - started) / len(units)
    started = time.monotonic()
    for unit in units:
        counted.DOUBLE.run(None, unit, Held(engine).check)  # pyright: ignore[reportArgumentType]
    call_s = (time.monotonic() - started) / len(units)
    print(f"\n### {len(units)} units that do nothing, on two nodes\n")
    print(f"connect and first unit {first_s:.1f} s; then {each_s * 1e3:.1f} ms a unit; a plain call takes "
          f"{call_s * 1e3:.2f} ms; a unit whose result is kept {kept_s * 1e3:.2f} ms")  # fmt: skip
    engine.release()
    return each_s


def _search(chosen: Any, home: Path, digest: str, engines: dict[int, WorkerEngine], *, thorough: bool) -> None:
    tasks = TASKS[:2] if chosen.quick else TASKS
    small = SearchEffort(search=4, confirm=8, thorough=thorough)
    effort = small if chosen.quick else SearchEffort(search=16, confirm=64, thorough=thorough)
    architecture = open_checkpoint(chosen.base).architecture
    node = engines[2].node
    store = open_store(node.settings, None)
    members, files = list[SearchMember](), list[list[ManifestFile]]()
    for name, suite_name in tasks:
        directory = EXAMPLES / "adapters" / name
        suite = parse_suite(EXAMPLES / "suites" / f"{suite_name}.yaml")
        members.append(SearchMember(adapter=replace(load_deltas(directory, architecture), name=name), suite=suite))
        paths = sorted(path for path in directory.iterdir() if path.is_file())
        own = [ManifestFile(path.name, path.stat().st_size, Digest(hash_file(path))) for path in paths]
        for path, file in zip(paths, own, strict=True):
            store.put(file.sha256, path)
        files.append(own)
    problem = SearchProblem(
        load=cache(lambda: load_model(chosen.base)), members=members, effort=effort, as_adapter=True
    )
    rows = [
        {"name": one.name, "weight": one.weight.to_json(), "suite": one.suite.to_json(), "files": to_rows(own)}
        for one, own in zip(members, files, strict=True)
    ]
    size_bytes = sum(spec.size_bytes for spec in architecture.tensors.values())
    hints = base_hints([f"file://{chosen.base.resolve()}"], size_bytes)
    kind = "A thorough search" if thorough else "A search"
    print(f"\n### {kind} over {len(tasks)} adapters: {effort.search} and {effort.confirm} examples of each suite\n")
    times: dict[int, list[Times]] = {1: [], 2: []}
    choices: set[str] = set()
    for number in range(chosen.rounds):
        for runners in (1, 2) if number % 2 == 0 else (2, 1):
            node.results.sweep(datetime.now(UTC))
            held = Held(engines[runners])
            key = share_architecture(node, architecture)
            document = {"base": digest, "architecture": key, "members": rows, "guards": [], **how_to_search(problem)}
            measured, choice = _run(held, problem, document, hints)
            times[runners].append(measured)
            choices.add(choice)
    for runners, rows in times.items():
        wall, share = median(row.wall_s for row in rows), median(row.share(runners) for row in rows)
        nodes = f"{runners} node{'s' * (runners > 1)}"
        print(f"{nodes}: {wall:.1f} s for {rows[0].units} units; {share:.1%} of the processes' time was outside units")
    ratio = median(one.wall_s / two.wall_s for one, two in zip(times[1], times[2], strict=True))
    print(f"two nodes are {ratio:.2f} times as fast; {len(choices)} choice{'s' * (len(choices) > 1)}")


def _run(held: Held, problem: SearchProblem, document: dict[str, Any], hints: BaseHints) -> tuple[Times, str]:
    elsewhere = Passes(held, document, hints, held.check)  # pyright: ignore[reportArgumentType]
    started = time.monotonic()
    report = optimize(problem, elsewhere=elsewhere)
    over = time.monotonic()
    seconds = [float(row["seconds"]) for row in _kept(held.engine.node.work_directory.parent)]
    held.engine.release()
    return Times(over - started, sum(seconds), len(seconds)), str(report.choice)


def _kept(home: Path) -> list[dict[str, Any]]:
    """The results of units that are kept, without the documents that they share."""
    rows = [json.loads(path.read_bytes()) for path in (home / "store" / "work").glob("*.json")]
    return [row for row in rows if "seconds" in row]


def _growth(cost_s: float) -> None:
    """Prints how a merge of 100 shards would grow."""
    unit_s, spread, plan_s, start_s = 60.0, 0.15, 5.0, 5.0
    print(f"\n### Simulated: {SHARDS} shards\n")
    print(f"Assumed: a shard takes {unit_s:.0f} s, lognormally spread by {spread:.0%}; longest first, one a node at a "
          f"time; {cost_s * 1e3:.0f} ms of the engine a unit, {plan_s:.0f} s of planning a node and {start_s:.0f} s "
          "until a node's process is ready; the store's bandwidth grows with the nodes.\n")  # fmt: skip
    chance = random.Random(0)  # noqa: S311 - a simulation
    shards = sorted((unit_s * chance.lognormvariate(0, spread) for _ in range(SHARDS)), reverse=True)
    alone = sum(shards) + plan_s
    print("| nodes | minutes | times one process | efficiency |\n|---|---|---|---|")
    for nodes in NODES:
        wall = start_s + plan_s + _makespan([shard_s + cost_s for shard_s in shards], nodes)
        print(f"| {nodes} | {wall / 60:.1f} | {alone / wall:.2f} | {alone / wall / nodes:.0%} |")


def _makespan(units: list[float], nodes: int) -> float:
    free = [0.0] * nodes
    for unit in units:
        heapq.heappush(free, heapq.heappop(free) + unit)
    return max(free)


if __name__ == "__main__":
    main()
