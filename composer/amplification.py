"""How large deltas are beside the weights that they are added to, and what rounding will leave: from sampled rows."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from composer.compared import Place
from composer.delta import Layout, LowRank, names_of
from composer.formats.checkpoint import Checkpoint
from composer.formats.header import FLOAT_DTYPES
from composer.source import Source, picked_rows
from composer.survival import Survival, survival_of
from composer.tensors import TORCH_DTYPES
from composer.weights import Weight

SAMPLED_ROWS = 32


@dataclass(frozen=True, slots=True)
class AtBase:
    """Of one place: |W|^2 of the rows that the deltas are for, estimated from the sampled ones; what rounding the
    weighted sum of the deltas leaves there; and the dtype it is rounded to."""

    energy: float
    survival: Survival
    dtype: str


def at_base(
    places: Mapping[Place, Sequence[LowRank | None]], weights: Sequence[Weight], base: Checkpoint
) -> dict[str, AtBase]:
    """By module, from rows at even distances. What the base does not have as plain floating point is left out."""
    found: dict[str, AtBase] = {}
    with ExitStack() as stack:
        opened: dict[Path, int] = {}
        for (module, _), deltas in places.items():
            own = [
                (one, weight.of(*names_of(one))) for one, weight in zip(deltas, weights, strict=True) if one is not None
            ]
            name = own[0][0].weight
            if name not in base.architecture.tensors or base.architecture.tensors[name].dtype not in FLOAT_DTYPES:
                continue
            path, entry = base.locate(name)
            if path not in opened:
                opened[path] = stack.enter_context(path.open("rb")).fileno()
            source = Source(opened[path], entry, own[0][0].stored_shape[1])
            energy, survival = _sampled(source, own, TORCH_DTYPES[entry.dtype])
            before = found.get(module, AtBase(0.0, Survival(), entry.dtype))
            found[module] = AtBase(before.energy + energy, before.survival + survival, entry.dtype)
    return found


def _sampled(source: Source, deltas: Sequence[tuple[LowRank, float]], dtype: torch.dtype) -> tuple[float, Survival]:
    first = deltas[0][0]
    count = first.stored_shape[0]
    rows = torch.linspace(0, count - 1, min(count, SAMPLED_ROWS)).round().long()
    W = picked_rows(source, [first.begin + row for row in rows.tolist()]).double()
    delta = torch.zeros_like(W)
    for one, weight in deltas:
        left, right = (one.B_OR, one.A_RI) if one.layout is Layout.LINEAR else (one.A_RI.T, one.B_OR.T)
        delta += (left[rows].double() * (one.scale * weight)) @ right.double()
    survival = survival_of(W, delta, (W + delta).float().to(dtype))
    return survival.weight * count / len(rows), survival
