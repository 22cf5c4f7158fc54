"""Estimates how much of a combination survives rounding to a base's dtype, from sampled rows of the base's weights."""

from dataclasses import dataclass

import torch

from composer.conflicts.comparison import Compared
from composer.deltas.delta import names_of
from composer.deltas.tensors import TORCH_DTYPES
from composer.formats.checkpoints.checkpoint import Checkpoint
from composer.formats.checkpoints.header import FLOAT_DTYPES
from composer.merge.io.source import Source, picked_rows
from composer.merge.rounding_loss import RoundingLoss, survival_of

SAMPLED_ROWS = 32


@dataclass(frozen=True, slots=True)
class Rounded:
    """The part of the weighted sum of the deltas in one module that survives rounding, and the dtype it is rounded
    to."""

    survival: RoundingLoss
    dtype: str


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
