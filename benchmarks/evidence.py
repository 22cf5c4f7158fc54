"""Cost of evidence: evaluating a suite, comparing three adapters by factors and by activations, and probing them.

The floor is a plain forward pass over the same 32 examples, batched in the same way, with all logits: what every
evaluation needs. Everything runs in one process, with one torch thread and with torch's default number of threads.
"""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from benchmarks import harness
from benchmarks.harness import Case, Sample
from composer.conflicts.evidence.activations import activations
from composer.conflicts.evidence.probe import Effort, Probed, probe
from composer.conflicts.report import conflicts
from composer.deltas.variants.load import LoadedAdapter, load_deltas
from composer.evaluation.evaluate import evaluate
from composer.evaluation.measure import encode
from composer.evaluation.model import LoadedModel, load_model
from composer.formats.recipes.suite import Suite, parse_suite

OWN = {"sql-migration": "sql-exact", "terraform-review": "terraform-exact", "support-macros": "support-exact"}
GUARD = "guard-general"
FLOOR = "forward of 32 examples"
SUITES = "whole suites"


def main() -> None:
    chosen = harness.options(__doc__, rounds=4)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    harness.announce("evidence", "torch", "transformers")
    started = perf_counter()
    loaded = load_model(chosen.base, "cpu")
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    print(f"loading the model took {perf_counter() - started:.1f} s; {dtype}")
    adapters = [load_deltas(Path("examples/adapters") / name, loaded.architecture) for name in OWN]
    for threads in [1] if chosen.quick else sorted({1, torch.get_num_threads()}):
        torch.set_num_threads(threads)
        results = harness.interleave(_cases(loaded, adapters), chosen.rounds)
        harness.report(f"Evidence with {threads} torch thread{'s' * (threads > 1)}", results, FLOOR)
    if not chosen.quick:
        results = harness.interleave(_probes(loaded, adapters), 1)
        harness.report("Three pairs and the three together: a probe, and whole suites of 32 examples", results, SUITES)


def _cases(loaded: LoadedModel, adapters: list[LoadedAdapter]) -> dict[str, Case]:
    suites = {name: parse_suite(Path(f"examples/suites/{name}.yaml")) for name in (*OWN.values(), GUARD)}
    sql = suites["sql-exact"]
    work: dict[str, Callable[[], Any]] = {
        FLOOR: partial(_forward, loaded, sql),
        "eval of the base": partial(evaluate, loaded, sql),
        "eval of an adapter": partial(evaluate, loaded, sql, adapters[0].deltas),
        "conflicts of three": partial(conflicts, adapters, [1.0] * len(adapters)),
        "activations of three on 8 prompts": partial(
            activations,
            loaded,
            {adapter.name: adapter.deltas for adapter in adapters},
            [example.prompt for example in sql.sample(8)],
        ),
    }
    return {name: partial(_timed, run) for name, run in work.items()}


def _probes(loaded: LoadedModel, adapters: list[LoadedAdapter]) -> dict[str, Case]:
    suites = {name: parse_suite(Path(f"examples/suites/{name}.yaml")) for name in (*OWN.values(), GUARD)}
    members = [Probed(adapter.name, adapter.deltas, 1.0, suites[OWN[adapter.name]]) for adapter in adapters]
    efforts = {SUITES: 32, "probe, K = 4": 4, "probe, K = 2": 2, "probe, K = 2 to 16": Effort(2, 16)}
    return {
        name: partial(_timed, partial(probe, lambda: loaded, members, [suites[GUARD]], effort))
        for name, effort in efforts.items()
    }


def _timed(run: Callable[[], Any]) -> Sample:
    started = perf_counter()
    run()
    return Sample(perf_counter() - started)


@torch.inference_mode()
def _forward(loaded: LoadedModel, suite: Suite) -> None:
    """Runs the examples ordered by length and right-padded, in batches of the evaluation's size."""
    encoded = sorted((encode(loaded, example, suite.chat).ids for example in suite.examples), key=len, reverse=True)
    while encoded:
        size = max(1, 1024 // len(encoded[0]))
        batch, encoded = encoded[:size], encoded[size:]
        length = len(batch[0])
        ids_BT = torch.tensor([[*ids, *[0] * (length - len(ids))] for ids in batch])
        loaded.model(input_ids=ids_BT, use_cache=False)


if __name__ == "__main__":
    main()
