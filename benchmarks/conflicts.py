"""Cost of a conflict report for three adapters at the shapes of a 7B model: all checks, and the pass over Gram matrices
alone.

The adapters are random bfloat16 factors of rank 16 on all 224 linear weights; the cost of the checks does not depend on
values. The floor is the two products of factors that every check builds on, one BLAS call per side and weight, in
float64.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.harness import Sample
from benchmarks.methods import ADAPTERS, LAYERS, RANK, SHAPES
from composer.conflicts.render.text import headlines
from composer.conflicts.report import conflicts
from composer.deltas.delta import Layout, LowRank
from composer.deltas.lowrank import Grams
from composer.deltas.tensors import torch_threads
from composer.deltas.variants.load import LoadedAdapter, load_deltas

GRAMS = "Gram matrices: norms, cosines, interference"
FLOOR = "the products alone"


def main() -> None:
    chosen = harness.options(__doc__, rounds=5)
    harness.announce("conflicts", "torch")
    layers = 2 if chosen.quick else LAYERS
    adapters = [_adapter(number, layers) for number in range(ADAPTERS)]
    deltas_of_weights = [
        [delta for delta in deltas if isinstance(delta, LowRank)]
        for deltas in zip(*(adapter.deltas for adapter in adapters), strict=True)
    ]
    factors = [
        (torch.cat([delta.B_OR for delta in deltas], 1).double(), torch.cat([delta.A_RI for delta in deltas]).double())
        for deltas in deltas_of_weights
    ]
    weights = [1.0] * ADAPTERS
    cases = {
        FLOOR: partial(_each, _products, factors),
        GRAMS: partial(_each, lambda deltas: Grams.of(deltas).inner(), deltas_of_weights),
        "all checks": partial(conflicts, adapters, weights),
        "all checks, as JSON": lambda: conflicts(adapters, weights).to_json(),
    }
    results = harness.interleave({name: partial(_timed, case) for name, case in cases.items()}, chosen.rounds)
    harness.report(f"{ADAPTERS} adapters of rank {RANK}, {len(deltas_of_weights)} weights", results, FLOOR)
    print("\n" + "\n".join(headlines(conflicts(adapters, weights))))


def _adapter(number: int, layers: int) -> LoadedAdapter:
    generator = torch.Generator().manual_seed(number)
    deltas: list[LowRank] = []
    for layer in range(layers):
        for name, (outputs, inputs) in SHAPES.items():
            module = f"model.layers.{layer}.{name}"
            A_RI = torch.randn(RANK, inputs, generator=generator).bfloat16()
            B_OR = torch.randn(outputs, RANK, generator=generator).bfloat16()
            deltas.append(
                LowRank(module=module, weight=f"{module}.weight", layout=Layout.LINEAR, A=A_RI, B=B_OR, scale=1.0)
            )
    any_adapter = load_deltas(Path("examples/adapters/sql-migration"), None)
    return replace(any_adapter, name=f"adapter {number}", deltas=deltas)


def _each(work: Callable[[Any], Any], items: Sequence[Any]) -> None:
    with torch_threads(1):
        for item in items:
            work(item)


def _products(factors: tuple[torch.Tensor, torch.Tensor]) -> None:
    B_OR, A_RI = factors
    _ = B_OR.T @ B_OR, A_RI @ A_RI.T


def _timed(run: Callable[[], Any]) -> Sample:
    started = time.perf_counter()
    run()
    return Sample(time.perf_counter() - started)


if __name__ == "__main__":
    main()
