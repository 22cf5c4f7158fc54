"""Cost of combining three adapters at the shapes of a 7B model: every method, and PEFT's SVD against ours.

The adapters are random, of rank 16 on all linear weights (224 of them). A method's cost does not depend on values,
except for `ctm`, which iterates longest on adapters that share nothing. Full-space methods are timed by computing every
row of their result, as a merge does. PEFT is timed on one weight of 4096 x 4096 and extrapolated to the model.
"""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from benchmarks import harness
from benchmarks.harness import Sample
from composer.deltas.delta import Layout, LowRank, RowwiseDelta
from composer.deltas.tensors import torch_threads
from composer.formats.recipes.methods import Compressed, parse_settings
from composer.methods.pipeline import Selections, SlotDelta, WeightSlot, combine_slot

HIDDEN, INNER, LAYERS, RANK, ADAPTERS = 4096, 11008, 32, 16, 3
SHAPES = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (HIDDEN, HIDDEN)),
    **dict.fromkeys(("gate_proj", "up_proj"), (INNER, HIDDEN)),
    "down_proj": (HIDDEN, INNER),
}
IN_A_BASIS = ("svd", "core_ties", "core_tsv", "core_iso", "knots_ties", "ctm_ties", "pico_svd")
IN_FULL = ("ties", "dare_ties", "della", "breadcrumbs_ties", "sce")
QUICK = 1024  # PEFT's full SVD of a 4096 x 4096 weight takes a minute on busy cores


def main() -> None:
    chosen = harness.options(__doc__, rounds=3)
    harness.announce("methods", "torch", "peft")
    layers = 2 if chosen.quick else LAYERS
    slots = [slot for layer in range(layers) for slot in _slots(layer)]
    hidden = QUICK if chosen.quick else HIDDEN
    model = _peft_model(hidden)
    theirs = f"PEFT svd, one weight of {hidden} x {hidden}"
    ours = f"svd to rank {RANK}, {len(slots)} weights"
    results = harness.interleave(
        {ours: lambda: _timed(partial(combine, "svd", slots)), theirs: lambda: _timed(partial(_peft_svd, model))},
        chosen.rounds,
    )
    harness.report("Three adapters of rank 16 as one of rank 16", results, ours)
    weights = layers * sum(o * i for o, i in SHAPES.values()) / hidden**2
    pairs = zip(results[ours], results[theirs], strict=True)
    times = [weights * slow.seconds / fast.seconds for fast, slow in pairs]
    print(f"\nPEFT on the model is taken as {weights:.0f} times one weight: {harness.spread(times)} times ours")
    layer = list(_slots(0))
    _table(layer[:1] if chosen.quick else layer, chosen.rounds)


def _table(layer: list[WeightSlot], rounds: int) -> None:
    """One layer with all methods."""
    cases = {name: partial(_timed, partial(combine, name, layer)) for name in (*IN_A_BASIS, *IN_FULL)}
    results = harness.interleave(cases, rounds)
    rows = [["method", "one layer, s", f"{LAYERS} layers, s"]]
    for name, samples in results.items():
        seconds = [sample.seconds for sample in samples]
        rows.append([name, harness.spread(seconds), harness.spread([LAYERS * second for second in seconds])])
    shown = f"{len(layer)} of {len(SHAPES)} weights a layer"
    harness.table(f"{ADAPTERS} adapters, {shown} ({rounds} rounds, {LAYERS} layers computed)", rows)


def combine(method: str, slots: list[WeightSlot]) -> None:
    """The complete result of a method: in a basis its factors, in full space every row."""
    settings = parse_settings(method, {"rank": RANK} if method in IN_A_BASIS else {})
    assert isinstance(settings, Compressed)

    def one(slot: WeightSlot) -> None:
        added, _ = combine_slot(slot, settings, Selections())
        for delta in added:
            if isinstance(delta, RowwiseDelta):
                rows, columns = delta.stored_shape
                for begin in range(0, rows, 256):
                    count = min(256, rows - begin)
                    delta.rows(torch.zeros(()).expand(count, columns), begin)

    with torch_threads(1), ThreadPoolExecutor(2) as pool:
        list(pool.map(one, slots))


def _slots(layer: int) -> Iterator[WeightSlot]:
    generator = torch.Generator().manual_seed(layer)
    for name, (outputs, inputs) in SHAPES.items():
        parts: list[SlotDelta] = []
        for number in range(ADAPTERS):
            A = torch.randn(RANK, inputs, generator=generator)
            B = torch.randn(outputs, RANK, generator=generator)
            delta = LowRank(
                module=f"layers.{layer}.{name}",
                weight=f"layers.{layer}.{name}.weight",
                layout=Layout.LINEAR,
                A=A,
                B=B,
                scale=1.0,
            )
            parts.append(SlotDelta(number, delta, 1.0, f"{number}/{layer}/{name}"))
        yield WeightSlot(parts, float(ADAPTERS))


def _peft_model(hidden: int) -> object:
    model = get_peft_model(nn.Sequential(nn.Linear(hidden, hidden)), _config(), "a0")
    for number in range(1, ADAPTERS):
        model.add_adapter(f"a{number}", _config())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return model


def _config() -> LoraConfig:
    return LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"])


def _peft_svd(model: object) -> None:
    names = [f"a{number}" for number in range(ADAPTERS)]
    model.add_weighted_adapter(names, [1.0] * ADAPTERS, "all", combination_type="svd", svd_rank=RANK)  # pyright: ignore
    model.delete_adapter("all")  # pyright: ignore


def _timed(call: partial[None]) -> Sample:
    started = time.perf_counter()
    call()
    return Sample(time.perf_counter() - started)


if __name__ == "__main__":
    main()
