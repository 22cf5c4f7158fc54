"""Compares all adapters of a set: by module, by layer, and in the whole model, with what of their sum survives
rounding to a base's dtype."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from composer.deltas.delta import LowRank, RowwiseDelta, names_of
from composer.deltas.lowrank import PairSums, relations
from composer.deltas.tensors import TORCH_DTYPES, all_finite
from composer.deltas.variants.load import LoadedAdapter
from composer.formats.checkpoints.checkpoint import Checkpoint
from composer.formats.checkpoints.header import FLOAT_DTYPES
from composer.formats.recipes.weights import Weight, layer_of, tower_of
from composer.merge.io.source import Source, picked_rows
from composer.merge.rounding_loss import RoundingLoss, survival_of
from composer.methods.spectral import decomposing

Layer = tuple[str, int]
"""A tower, as the path before the layer's number, and the number."""
Slot = tuple[str, int]
"""A module and the first row of the delta in its weight. Each expert of a stack is a slot of its own."""
SAMPLED_ROWS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """`slots` holds what can be compared, one delta or None per adapter; `touched` holds the modules of each adapter.
    `factored` is true if every adapter consists of factors, which some methods require."""

    names: Sequence[str]
    weights: Sequence[Weight]
    slots: Mapping[Slot, Sequence[LowRank | None]]
    modules: Mapping[str, PairSums]
    layers: Mapping[Layer, PairSums]
    total: PairSums
    touched: Sequence[frozenset[str]]
    factored: bool


@dataclass(frozen=True, slots=True)
class Rounded:
    """The part of the weighted sum of the deltas in one module that survives rounding, and the dtype it is rounded
    to."""

    survival: RoundingLoss
    dtype: str


def compare_all(adapters: Sequence[LoadedAdapter], weights: Sequence[Weight]) -> Compared:
    """Compares the deltas, multiplied by `weights` (the effective ones). Leaves out deltas that are not finite, have no
    factors, or differ in shape at one slot; other checks name them. Raises NotSupported for numbers too large to
    compare."""
    slots = _slots(adapters)
    modules: dict[str, PairSums] = {}
    # Sequential: the work is many small calls, and two Python threads were no faster than one.
    for (module, _), deltas in slots.items():
        names = names_of(next(delta for delta in deltas if delta))
        with decomposing(module):
            one = relations(deltas, [weight.of(*names) for weight in weights])
        modules[module] = modules[module] + one if module in modules else one
    nothing = PairSums.zero(len(adapters))
    layers: dict[Layer, PairSums] = {}
    for module, sums in modules.items():
        layer = layer_of(module)
        if layer is not None:
            key = tower_of(module), layer
            layers[key] = layers.get(key, nothing) + sums
    touched = [
        frozenset(module for (module, _), deltas in slots.items() if deltas[index] is not None)
        for index in range(len(adapters))
    ]
    return Compared(
        names=[adapter.name for adapter in adapters],
        weights=weights,
        slots=slots,
        modules=modules,
        layers=dict(sorted(layers.items())),
        total=sum(modules.values(), nothing),
        touched=touched,
        factored=not any(isinstance(delta, RowwiseDelta) for adapter in adapters for delta in adapter.deltas),
    )


def rounded_at(compared: Compared, base: Checkpoint) -> dict[str, Rounded]:
    """Estimates by module, from evenly spaced rows. Weights that the base does not store as plain floats are left
    out."""
    estimates: dict[str, Rounded] = {}
    for (module, begin), deltas in compared.slots.items():
        both = zip(deltas, compared.weights, strict=True)
        own = [(delta, weight.of(*names_of(delta))) for delta, weight in both if delta is not None]
        first = own[0][0]
        spec = base.architecture.tensors.get(first.weight)
        # For a packed weight, the architecture has the unpacked dtype; its bytes may be stored as any dtype.
        if spec is None or spec.dtype not in FLOAT_DTYPES or first.weight in base.packed:
            continue
        file, entry = base.locate(first.weight)
        count, columns = first.stored_shape
        rows = torch.linspace(0, count - 1, min(count, SAMPLED_ROWS)).round().long().tolist()
        W = picked_rows(Source(file, entry, columns), [begin + row for row in rows]).double()
        delta = torch.zeros_like(W)
        for part, factor in own:
            left, right = part.stored_rows(rows, torch.float64)
            delta += (left * factor) @ right
        survival = survival_of(W, delta, (W + delta).float().to(TORCH_DTYPES[entry.dtype]))
        before = estimates.get(module, Rounded(RoundingLoss(), entry.dtype))
        estimates[module] = Rounded(before.survival + survival, entry.dtype)
    return estimates


def finite(delta: LowRank) -> bool:
    """Whether both factors are finite."""
    return all_finite(delta.A_RI) and all_finite(delta.B_OR)


def _slots(adapters: Sequence[LoadedAdapter]) -> dict[Slot, list[LowRank | None]]:
    slots: dict[Slot, list[LowRank | None]] = defaultdict(lambda: [None] * len(adapters))
    for index, adapter in enumerate(adapters):
        for delta in adapter.deltas:
            if isinstance(delta, LowRank) and finite(delta):
                slots[delta.module, delta.begin][index] = delta
    # Deltas of different shapes have no inner product; `structural` refuses them with both shapes named.
    return {slot: deltas for slot, deltas in slots.items() if len({own.stored_shape for own in deltas if own}) == 1}
