"""Retention of each adapter in merged checkpoints: `python -m benchmarks.kept_once BASE ADAPTER=SUITE... -- OUT...`.

Prints for each checkpoint a line of JSON with the members' kept shares of their gain, in nats on examples that no
method was fitted on, and their exact answers out of those that they give alone.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from composer.conflicts.evidence.outcome import effect_of
from composer.deltas.variants.load import load_deltas
from composer.evaluation.measure import ExampleScore, encode, measure
from composer.evaluation.model import LoadedModel, load_model
from composer.formats.recipes.suite import Suite, parse_suite
from composer.optimize.objective import kept_share

FITTED, MEASURED = 4, 16


def run(loaded: LoadedModel, suite: Suite, deltas: Sequence[object] = ()) -> list[ExampleScore]:
    unseen = suite.sample(MEASURED, frozenset(suite.sample(FITTED)))
    encoded = [encode(loaded, example, suite.chat, suite.ends) for example in unseen]
    return measure(loaded, encoded, deltas)  # pyright: ignore[reportArgumentType]


def main() -> None:
    base, *words = sys.argv[1:]
    split = words.index("--")
    pairs = [word.rpartition("=") for word in words[:split]]
    members = [(Path(adapter), parse_suite(Path(suite))) for adapter, _, suite in pairs]
    loaded = load_model(base, "cpu")
    before = [run(loaded, suite) for _, suite in members]
    alone = [run(loaded, suite, load_deltas(adapter, loaded.architecture).deltas) for adapter, suite in members]
    for out in words[split + 1 :]:
        merged = load_model(out, "cpu", dtype=loaded.model.dtype)
        effects = [
            effect_of((adapter.name, suite.name), before[index], alone[index], run(merged, suite), 1)
            for index, (adapter, suite) in enumerate(members)
        ]
        kept = [round(kept_share(effect), 4) for effect in effects]
        print(
            json.dumps({"kept": kept, "exact": [[effect.still_answered, effect.answered] for effect in effects]}),
            flush=True,
        )


if __name__ == "__main__":
    main()
