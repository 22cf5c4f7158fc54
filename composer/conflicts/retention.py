"""The retention of each adapter in the combination M: <M, Δ_i> / |Δ_i|^2 over the whole model.

For a plain sum of orthogonal deltas, this is the adapter's own weight. For any method, it is the weight with which Δ_i
alone explains most of M.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch

from composer.deltas.delta import Additive, Delta, LowRank, RowwiseDelta
from composer.deltas.lowrank import Grams
from composer.deltas.variants.load import LoadedAdapter
from composer.formats.checkpoints.numeric import Float64

MAX_DENSE_ENTRIES = 1 << 28
"""Full-space methods compute every entry, here and again in the merge. Beyond this many, they are skipped here."""
_BLOCK_ENTRIES = 1 << 22

_Slot = tuple[str, int]


def too_large(adapters: Sequence[LoadedAdapter]) -> bool:
    """Whether the dense deltas of all slots together would have too many entries."""
    shapes = {
        (delta.module, delta.begin): delta.stored_shape
        for adapter in adapters
        for delta in adapter.deltas
        if isinstance(delta, RowwiseDelta | LowRank)
    }
    return sum(rows * columns for rows, columns in shapes.values()) > MAX_DENSE_ENTRIES


def retained(adapters: Sequence[LoadedAdapter], combined: Sequence[Delta]) -> list[float | None]:
    """One number per adapter, from its deltas with factors. None for an adapter without any, and for all adapters if
    the combination reads the base."""
    merged: dict[_Slot, list[Additive]] = defaultdict(list)
    for delta in combined:
        if not isinstance(delta, RowwiseDelta | LowRank):
            continue
        merged[delta.module, delta.begin].append(delta)
    if any(isinstance(delta, RowwiseDelta) and delta.reads_base for deltas in merged.values() for delta in deltas):
        return [None] * len(adapters)
    products, energies = np.zeros(len(adapters)), np.zeros(len(adapters))
    for index, adapter in enumerate(adapters):
        for delta in adapter.deltas:
            if isinstance(delta, LowRank):
                there = merged[delta.module, delta.begin]
                factors = [other for other in there if isinstance(other, LowRank)]
                inner: Float64 = Grams.of([delta, *factors]).inner()
                dense = sum(_dense_product(other, delta) for other in there if isinstance(other, RowwiseDelta))
                energies[index] += float(inner[0, 0])  # |Δ|²
                products[index] += float(inner[0, 1:].sum()) + dense  # <M, Δ>
    both = zip(products.tolist(), energies.tolist(), strict=True)
    return [product / energy if energy > 0 else None for product, energy in both]


def _dense_product(computed: RowwiseDelta, delta: LowRank) -> float:
    rows, columns = computed.stored_shape
    left, right = delta.stored_factors()
    step = rows if computed.all_rows else max(1, _BLOCK_ENTRIES // columns)
    total = 0.0
    for begin in range(0, rows, step):
        own = left[begin : begin + step]
        # Any W will do: these deltas do not read the base.
        made = computed.rows(torch.zeros(()).expand(own.shape[0], columns), begin)
        total += float((made.float() @ right.T * own).sum(dtype=torch.float64))
    return total
