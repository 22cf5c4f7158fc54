"""The time of a job on one machine: seconds from the queue to its end, of each kind, in a registry of its own.

It runs in any checkout, so that two of them can be compared: give the second one as `--tool`. Each round then runs the
jobs once with each checkout, and prints the ratio within the round.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import harness

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
NAMES = ("sql-migration", "support-macros")
RECIPE: dict[str, Any] = {
    "inputs": [
        {"adapter": "acme/sql-migration:1.0.0", "suite": "sql-exact"},
        {"adapter": "acme/support-macros:1.0.0", "suite": "support-exact"},
    ],
    "gates": [],
}
_IMPORTED_S = 15.0
EVALUATED = ["sql-exact", "support-exact"]


def recipe(name: str) -> dict[str, Any]:
    """The recipe of a kind of job."""
    changes: dict[str, dict[str, Any]] = {
        "merge": {"method": "linear", "model": "acme/merged:1.0.0", "probe": 0},
        "ties merge": {"method": "ties", "model": "acme/ties:1.0.0", "probe": 0},
        "probe": {"method": "linear", "adapter": "acme/probed:1.0.0", "probe": 4},
        "adapter, measured": {
            "method": "linear", "adapter": "acme/measured:1.0.0", "probe": 0, "evaluate": EVALUATED,
        },
        "model, measured": {"method": "ties", "model": "acme/judged:1.0.0", "probe": 0, "evaluate": EVALUATED},
        "search": {
            "adapter": "acme/found:1.0.0", "probe": 0, "optimize": {"search": 2, "confirm": 4, "passes": 60},
        },
    }  # fmt: skip
    return RECIPE | changes[name]


QUICK = ("merge", "ties merge", "conflicts", "adapter, measured")
CASES = (*QUICK, "probe", "model, measured", "search", "evaluation")


def main() -> None:
    if len(sys.argv) > 3 and sys.argv[1] == "--one":
        print(json.dumps(_seconds(Path(sys.argv[2]), sys.argv[3:])))
        return
    chosen = harness.options(__doc__, rounds=3)
    harness.announce("jobs", "torch", "transformers")
    cases = QUICK if chosen.quick else CASES
    trees = {"here": ROOT} | ({"there": Path(chosen.tool)} if chosen.tool else {})
    rounds: list[dict[str, dict[str, float]]] = []
    for number in range(chosen.rounds):
        order = list(trees) if number % 2 == 0 else list(reversed(trees))
        rounds.append({tree: _run(trees[tree], chosen.base.resolve(), cases) for tree in order})
    print("\n| job | " + " | ".join(f"{tree}, s" for tree in trees) + " | ratio |\n|---|" + "---|" * (len(trees) + 1))
    for case in cases:
        medians = [f"{median(measured[tree][case] for measured in rounds):.2f}" for tree in trees]
        ratio = (
            f"{median(measured['here'][case] / measured['there'][case] for measured in rounds):.2f}"
            if chosen.tool
            else ""
        )
        print(f"| {case} | {' | '.join(medians)} | {ratio} |")


def _run(tree: Path, base: Path, cases: Sequence[str]) -> dict[str, float]:
    """The seconds of each job with the code of that checkout, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    command = [sys.executable, str(Path(__file__).resolve()), "--one", str(base), *cases]
    ran = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=True)
    return json.loads(ran.stdout.splitlines()[-1])


def _seconds(base: Path, cases: Sequence[str]) -> dict[str, float]:
    with TemporaryDirectory(prefix="jobs-") as home:
        os.environ["ADAPTORY_HOME"], os.environ["ADAPTORY_USER"] = home, "bench"
        import composer.conflicts.examine
        import composer.evaluation.model
        import composer.optimize.optimize
        from registry.cli.console.connect import connected
        from registry.environment.settings import Settings
        from registry.transfer.resources import open_resources
        from registry.worker.engine.opened import WorkerEngine
        from registry.worker.runner import run_one
        from registry.worker.steps import KINDS

        composer.evaluation.model.load_model(base)
        _fill(base)
        resources, seconds = open_resources(Settings()), dict[str, float]()
        engine = WorkerEngine(resources.settings, resources.store)
        with connected() as connection:
            _begin(connection.api, "conflicts")  # a worker has imported everything before its second job
            run_one(resources, KINDS, "bench", engine=engine)
            time.sleep(_IMPORTED_S)
            for case in cases:
                _begin(connection.api, case)
                began = time.monotonic()
                run_one(resources, KINDS, "bench", engine=engine)
                seconds[case] = time.monotonic() - began
            ended = {job["id"]: job["state"] for job in connection.api.pages("/v1/jobs")}
        if set(ended.values()) != {"done"}:
            raise RuntimeError(f"not all jobs are done: {ended}")
        engine.close()
        resources.close()
        return seconds


def _fill(base: Path) -> None:
    adaptory = [sys.executable, "-m", "registry.cli.start"]
    words = [["base", "add", base, "--name", "smol"]]
    words += [["suite", "add", EXAMPLES / "suites" / f"{name}.yaml"] for name in EVALUATED]
    words += [["push", EXAMPLES / "adapters" / name, f"acme/{name}:1.0.0", "--base", "smol"] for name in NAMES]
    for arguments in words:
        subprocess.run([*adaptory, *map(str, arguments)], stdout=subprocess.DEVNULL, check=True)


def _begin(api: Any, case: str) -> None:
    releases = [f"acme/{name}:1.0.0" for name in NAMES]
    if case == "conflicts":
        api.post("/v1/conflicts", {"inputs": [{"adapter": release} for release in releases]})
    elif case == "evaluation":
        api.post("/v1/evaluations", {"releases": releases, "suites": EVALUATED})
    else:
        api.post("/v1/compositions", {"recipe": recipe(case), "plan": False})


if __name__ == "__main__":
    main()
