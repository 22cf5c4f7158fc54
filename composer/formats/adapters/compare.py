"""Compares two adapters, module by module, from their factors alone. No torch.

With D the old delta of a module and D' the new one, a = <D, D'> / |D|^2 and E = D' - a D (the part of D'
orthogonal to D), the change D' - D = (a - 1) D + E has orthogonal parts, and its energy is split into

    lost    max(1 - a, 0)^2 |D|^2             how far D was weakened (or turned round)
    gained  max(a - 1, 0)^2 |D|^2 + |E|^2     how far it was amplified, and what is new

so that gained + lost = |D' - D|^2. All of it comes from small cores: with QR of the stacked factors, [B, B'] = Q_B R_B
and [A^T, A'^T] = Q_A R_A, each delta is s Q_B (its columns of R_B) (its columns of R_A)^T Q_A^T. Differences are taken
between those cores in float64, where two large norms would cancel.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from math import sqrt
from typing import Any, Literal, cast

import numpy as np

from composer.formats.adapters.factors import MAX_ENERGY, blocks, factors, readable
from composer.formats.adapters.facts import Adapter
from composer.formats.adapters.placement.result import LOW_RANK_KINDS, PlacedModule, PlacementResult
from composer.formats.checkpoints.header import FLOAT_DTYPES
from composer.formats.checkpoints.numeric import Float64, Summed

# A difference below this share of the larger norm is float64 rounding.
_SAME = 1e-9

Kind = Literal["delta", "replacement"]
Status = Literal["changed", "same", "added", "removed", "reshaped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EnergyChange(Summed):
    """Energies (squares of Frobenius norms) of two deltas. They add up over modules; quotients are taken last."""

    old: float = 0.0
    new: float = 0.0
    inner: float = 0.0
    difference: float = 0.0
    gained: float = 0.0
    lost: float = 0.0

    @property
    def cosine(self) -> float | None:
        """<D, D'> / (|D| |D'|); None if one of them is zero."""
        norms = sqrt(self.old) * sqrt(self.new)
        return max(-1.0, min(1.0, self.inner / norms)) if norms else None

    @property
    def finite(self) -> bool:
        """Whether all sums are small enough that sums over many modules stay finite too."""
        return all(abs(getattr(self, field.name)) <= MAX_ENERGY for field in fields(self))

    def to_json(self) -> dict[str, float | None]:
        return {
            "norm_old": sqrt(self.old),
            "norm_new": sqrt(self.new),
            "cosine": self.cosine,
            "norm_difference": sqrt(self.difference),
            "energy_gained": self.gained,
            "energy_lost": self.lost,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleChange:
    """One module, in one adapter or in both. `change` is None if the two shapes cannot be compared. A `replacement` (a
    tensor saved in full) is compared as a tensor: its norms are those of the weights."""

    module: str
    kind: Kind
    status: Status
    rank_old: int | None
    rank_new: int | None
    change: EnergyChange | None

    def to_json(self) -> dict[str, Any]:
        document = {"module": self.module, "kind": self.kind, "status": self.status}
        numbers = self.change.to_json() if self.change else dict.fromkeys(EnergyChange().to_json())
        return {**document, "rank_old": self.rank_old, "rank_new": self.rank_new, **numbers}


@dataclass(frozen=True, slots=True)
class AdapterComparison:
    """`overall` sums the deltas, without replacements; `left_out` names modules that could not be read as numbers."""

    modules: tuple[ModuleChange, ...]
    overall: EnergyChange
    left_out: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "whole": self.overall.to_json(),
            "modules": [module.to_json() for module in self.modules],
            "left_out": list(self.left_out),
        }


@dataclass(frozen=True, slots=True)
class _Side:
    """A module of one of the adapters."""

    adapter: Adapter
    placed: PlacedModule

    @property
    def readable(self) -> bool:
        if self.placed.kind in LOW_RANK_KINDS:
            return readable(self.adapter, self.placed)
        return all(self.adapter.header.tensors[key].dtype in FLOAT_DTYPES for key in self.placed.parts.values())


def compare(old: Adapter, new: Adapter, old_placed: PlacementResult, new_placed: PlacementResult) -> AdapterComparison:
    """Every module of either adapter, the largest change first. Variants' additions to s B A (DoRA) are ignored; deltas
    of another form are left out."""
    before, after = _sides(old, old_placed), _sides(new, new_placed)
    changes: list[ModuleChange] = []
    others = {module.module for placed in (old_placed, new_placed) for module in placed.adapted}
    left_out = sorted(others - {name for kind, name in {**before, **after} if kind == "delta"})
    for (kind, name), earlier, later in ((key, before.get(key), after.get(key)) for key in {**before, **after}):
        sides = [side for side in (earlier, later) if side]
        reshaped = len({side.placed.shape for side in sides}) > 1
        change = _change(kind, earlier, later) if all(side.readable for side in sides) and not reshaped else None
        if not reshaped and (change is None or not change.finite):
            left_out.append(name)
            continue
        rank_old, rank_new = (side.placed.rank if side and kind == "delta" else None for side in (earlier, later))
        status = _status(earlier, later, change)
        if change and status == "same":
            change = EnergyChange(old=change.old, new=change.new, inner=change.inner)
        changes.append(
            ModuleChange(module=name, kind=kind, status=status, rank_old=rank_old, rank_new=rank_new, change=change)
        )
    overall = sum((row.change for row in changes if row.change and row.kind == "delta"), EnergyChange())
    changes.sort(key=lambda row: row.change.difference if row.change else float("inf"), reverse=True)
    return AdapterComparison(tuple(changes), overall, tuple(left_out))


def _sides(adapter: Adapter, placed: PlacementResult) -> dict[tuple[Kind, str], _Side]:
    sides: dict[tuple[Kind, str], _Side] = {}
    for module in placed.modules:
        if module.kind in LOW_RANK_KINDS:
            sides["delta", module.module] = _Side(adapter, module)
        elif module.kind == "replacement":
            sides["replacement", module.weight] = _Side(adapter, module)
    return sides


def _status(old: _Side | None, new: _Side | None, change: EnergyChange | None) -> Status:
    if old is None:
        return "added"
    if new is None:
        return "removed"
    if change is None:
        return "reshaped"
    return "same" if change.difference <= _SAME**2 * max(change.old, change.new) else "changed"


def _change(kind: Kind, old: _Side | None, new: _Side | None) -> EnergyChange:
    with np.errstate(over="ignore", invalid="ignore"):
        return _of_deltas(old, new) if kind == "delta" else _of_tensors(old, new)


def _of_deltas(old: _Side | None, new: _Side | None) -> EnergyChange:
    """Both deltas in one basis, as cores; a missing delta is zero."""
    pairs = [factors(side.adapter, side.placed) for side in (old, new) if side]
    R_B, R_A = (
        cast(Float64, np.linalg.qr(stacked, mode="r"))
        for stacked in (np.concatenate([B for _, B in pairs], axis=1), np.concatenate([A for A, _ in pairs]).T)
    )
    cores: list[Float64] = []
    begin = 0
    for side in (old, new):
        end = begin + (side.placed.rank if side else 0)
        scale = side.placed.scale if side else 0.0
        cores.append(scale * (R_B[:, begin:end] @ R_A[:, begin:end].T))
        begin = end
    D, N = cores
    return _split(*(float(product.sum()) for product in (D * D, N * N, D * N, (N - D) ** 2)))


def _of_tensors(old: _Side | None, new: _Side | None) -> EnergyChange:
    """Streamed a few million elements at a time: a replaced head has hundreds of millions."""
    before = _elements(old) if old else (np.zeros(len(block)) for block in _elements(new))
    after = _elements(new) if new else (np.zeros(len(block)) for block in _elements(old))
    sums = np.zeros(4)
    for D, N in zip(before, after, strict=True):
        sums += (D @ D, N @ N, D @ N, ((N - D) ** 2).sum())
    return _split(*sums.tolist())


def _split(old: float, new: float, inner: float, difference: float) -> EnergyChange:
    """The energies of D and D', <D, D'> and |D' - D|^2, with the energy gained and lost."""
    along = inner / old if old else 1.0
    rescaled = (along - 1) ** 2 * old
    beside = max(difference - rescaled, 0.0)
    gained, lost = (beside + rescaled, 0.0) if along > 1 else (beside, rescaled)
    return EnergyChange(old=old, new=new, inner=inner, difference=difference, gained=gained, lost=lost)


def _elements(side: _Side | None) -> Iterator[Float64]:
    if side is None:
        return iter(())
    (key,) = side.placed.parts.values()
    return blocks(side.adapter.weights_path, side.adapter.header.tensors[key])
