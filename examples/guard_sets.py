"""Measure what a guard in the fit of RegMean saves: sets of adapters that were trained without rehearsal.

    python examples/train.py unrehearsed --base BASE --out ADAPTERS
    python examples/guard_sets.py --base BASE --adapters ADAPTERS

For each set and weight of the guard, prints a row: the share of the worst member's gain in nats that is left, exact
answers, both on 12 examples that nothing was fitted on, and the nats a token above the base on the 12 examples of the
guard that are left. Each member is fitted on 4 examples.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from time import process_time

from study_sets import suite_of
from tasks import STUDY_TASKS, TASKS

from composer.deltas.variants.load import load_deltas
from composer.evaluation.calibration import Calibration
from composer.evaluation.hooks import Deltas
from composer.evaluation.measure import encode, measure
from composer.evaluation.model import LoadedModel, load_model
from composer.formats.checkpoints.checkpoint import open_checkpoint
from composer.formats.recipes.methods import Regmean
from composer.formats.recipes.suite import CalibrationSet, Example, Suite, guard_sets
from composer.methods.combine import combine_deltas
from composer.optimize.objective import LEAST_GAIN

SETS = (
    ("records",),
    ("sorting",),
    ("cron", "commits"),
    ("dates-iso", "records"),
    ("sorting", "dates-spoken"),
    ("records", "orders"),
    ("dates-iso", "records", "cron"),
)
WEIGHTS = (0.0, 0.1, 0.3, 1.0)
FITTED, JUDGED = 4, 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="the directory make_base.py wrote")
    parser.add_argument("--adapters", type=Path, required=True, help="where train.py put the adapters")
    chosen = parser.parse_args()
    loaded, guard = load_model(chosen.base, "cpu"), suite_of(TASKS["guard"])
    architecture = open_checkpoint(chosen.base).architecture
    fitted = guard_sets([guard])
    others = guard.sample(None, without=frozenset(fitted[0].examples))
    on_base = nats(loaded, guard, others)[0]
    print("| members | guard alone | weight | kept | exact | guard | CPU |\n|---|---|---|---|---|---|---|")
    for names in SETS:
        tasks = [suite_of(STUDY_TASKS[name]) for name in names]
        unseen = [task.sample(JUDGED, without=frozenset(task.sample(FITTED))) for task in tasks]
        adapters = [load_deltas(chosen.adapters / f"{name}-unrehearsed", architecture) for name in names]
        base = [nats(loaded, *of) for of in zip(tasks, unseen, strict=True)]
        alone = [nats(loaded, task, rows, own.deltas) for task, rows, own in zip(tasks, unseen, adapters, strict=True)]
        cost = max(nats(loaded, guard, others, adapter.deltas)[0] for adapter in adapters) - on_base
        for weight in WEIGHTS:
            sets = [CalibrationSet(task, FITTED) for task in tasks]
            settings = Regmean(guard=weight)
            calibration, begun = Calibration(lambda: loaded, sets, settings, guards=fitted), process_time()
            how = ("regmean", {"guard": weight}, calibration.observe)
            deltas = combine_deltas(adapters, [1.0] * len(names), *how).deltas
            cpu_s = process_time() - begun
            left = [nats(loaded, task, rows, deltas) for task, rows in zip(tasks, unseen, strict=True)]
            kept = min(
                (before - after) / max(before - own, LEAST_GAIN)
                for (before, _), (own, _), (after, _) in zip(base, alone, left, strict=True)
            )
            exact = ", ".join(f"{after} of {own}" for (_, own), (_, after) in zip(alone, left, strict=True))
            rise = nats(loaded, guard, others, deltas)[0] - on_base
            row = (" + ".join(names), f"{cost:+.2f}", weight, f"{kept:.3f}", exact, f"{rise:+.2f}", f"{cpu_s:.0f} s")
            print(f"| {' | '.join(map(str, row))} |", flush=True)


def nats(loaded: LoadedModel, suite: Suite, examples: Sequence[Example], deltas: Deltas = ()) -> tuple[float, int]:
    """Nats a token, and exact answers."""
    rows = measure(loaded, [encode(loaded, example, suite.chat, suite.ends) for example in examples], deltas)
    return sum(row.nats for row in rows) / sum(row.tokens for row in rows), sum(bool(row.exact) for row in rows)


if __name__ == "__main__":
    main()
