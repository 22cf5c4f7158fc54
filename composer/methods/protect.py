"""Protects adapters: removes from every other delta its part in their subspaces.

Without the inputs of a protected delta, another delta no longer reacts to what that one reacts to; without its outputs,
it no longer writes where that one writes. The subspaces depend only on the delta, not on its factors or size. Shapes of
a stored delta: M rows, N columns, rank r, K directions of all protected deltas together. No M x N matrix is formed.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import cast, overload

import torch

from composer.deltas.delta import Additive, Delta, Layout, LowRank, Replacement, names_of, spilled
from composer.deltas.lowrank import NOISE, numerical_rank
from composer.deltas.stored import SpillFile
from composer.deltas.tensors import CPU, torch_threads, workers_on
from composer.deltas.variants.load import LoadedAdapter
from composer.formats.recipes.methods import Combined, MethodSettings
from composer.formats.recipes.weights import Weight
from composer.methods.basis import factored, norm_of
from composer.methods.spectral import decomposing
from composer.methods.structural import on_own_head

TOGETHER = 16  # slots whose results are in memory at once
_At = tuple[int, int]  # adapter, index of the delta in it


def project_out_protected(
    adapters: Sequence[LoadedAdapter], weights: Sequence[Weight], settings: MethodSettings, device: torch.device = CPU
) -> list[LoadedAdapter]:
    """Projects adapters off the subspaces of those that the settings protect.

    `settings.tied` is resolved (`resolve_tied`). Deltas with weight 0 protect nothing. Ranks do not change.
    Projected deltas are float32, computed on `device` and spilled to disk, so that memory holds a few slots. Raises
    NotSupported if a delta without factors shares a slot with a protected one, whichever of the two it is.
    """
    if not isinstance(settings, Combined):
        return list(adapters)
    chosen = {position - 1 for position in settings.protect}
    moved, spill = [dict[int, LowRank]() for _ in adapters], SpillFile()
    shared = _shared(adapters, weights, chosen, settings.tied) if chosen else []
    if not shared:
        return list(adapters)

    def at(slot: Sequence[_At]) -> tuple[list[_At], list[Additive], list[LowRank]]:
        """(indices of the projected deltas, the inputs, the projected deltas)."""
        deltas = [(position, cast(Additive, adapters[position[0]].deltas[position[1]])) for position in slot]
        with decomposing(deltas[0][1].module):
            protected = [factored(delta).to(device) for (adapter, _), delta in deltas if adapter in chosen]
            room = _Room.beside(protected, settings.protect_side)
            others = [(position, delta) for position, delta in deltas if position[0] not in chosen]
            made = [room.without(factored(delta).to(device)) for _, delta in others]
        return [position for position, _ in others], [delta for _, delta in deltas], made

    with torch_threads(1), ThreadPoolExecutor(workers_on(device), "protect") as pool:
        for begin in range(0, len(shared), TOGETHER):
            for indices, inputs, made in list(pool.map(at, shared[begin : begin + TOGETHER])):
                for (adapter, number), delta in zip(indices, spilled(spill, made), strict=True):
                    moved[adapter][number] = delta
                drop_pages_of(inputs)
    pairs = zip(adapters, moved, strict=True)
    return [replace(adapter, deltas=_Moved(adapter.deltas, own)) if own else adapter for adapter, own in pairs]


def drop_pages_of(deltas: Sequence[Additive]) -> None:
    """Drops the resident pages of stored factors that were read."""
    for delta in deltas:
        if isinstance(delta, LowRank):
            delta.drop_pages()


class _Moved(Sequence[Delta]):
    """An adapter's deltas, some of them replaced; the others are still made on demand."""

    def __init__(self, deltas: Sequence[Delta], moved: Mapping[int, LowRank]) -> None:
        self._deltas, self._moved = deltas, moved

    def __len__(self) -> int:
        return len(self._deltas)

    @overload
    def __getitem__(self, index: int) -> Delta: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Delta, ...]: ...
    def __getitem__(self, index: int | slice) -> Delta | tuple[Delta, ...]:
        numbers = range(len(self))[index]
        if isinstance(numbers, range):
            return tuple(self[number] for number in numbers)
        return self._moved.get(numbers) or self._deltas[numbers]


def _shared(
    adapters: Sequence[LoadedAdapter], weights: Sequence[Weight], chosen: set[int], tied: str
) -> list[list[_At]]:
    """The deltas of each slot that both a protected adapter and another one change."""
    slots: dict[tuple[str, int], list[_At]] = defaultdict(list)
    for index, (adapter, weight) in enumerate(zip(adapters, weights, strict=True)):
        for number, original in enumerate(adapter.deltas):
            delta = on_own_head(original) if tied == "untie" else original
            if not isinstance(delta, Replacement) and (index not in chosen or weight.of(*names_of(delta))):
                slots[delta.weight, delta.begin].append((index, number))
    return [own for own in slots.values() if len({adapter in chosen for adapter, _ in own}) == 2]


@dataclass(frozen=True, slots=True)
class _Room:
    """The protected subspaces: orthonormal columns over the rows (M x K) and over the columns (N x K), float64; or
    None."""

    rows: torch.Tensor | None
    columns: torch.Tensor | None

    @classmethod
    def beside(cls, protected: Sequence[LowRank], side: str) -> "_Room":
        """The joint subspaces of several deltas, from each one's own basis: a large delta does not hide a small one."""
        rows, columns = list[torch.Tensor](), list[torch.Tensor]()
        for delta in protected:
            U, V = _spans(delta)
            if side == "both" or (side == "output") == (delta.layout is Layout.LINEAR):
                rows.append(U)
            if side == "both" or (side == "input") == (delta.layout is Layout.LINEAR):
                columns.append(V)
        return cls(_joined(rows), _joined(columns))

    def without(self, delta: LowRank) -> LowRank:
        """The delta without the protected subspaces. A remainder that is only noise becomes zero, since its direction
        is random."""
        left, right = delta.stored_factors(torch.float64)
        before = norm_of((left, right))
        if self.rows is not None:
            left = left - self.rows @ (self.rows.T @ left)
        if self.columns is not None:
            right = right - (right @ self.columns) @ self.columns.T
        if norm_of((left, right)) <= NOISE * before:
            left = torch.zeros_like(left)
        B_OR, A_RI = (left, right) if delta.layout is Layout.LINEAR else (right.T, left.T)
        return replace(delta, A=A_RI.float().contiguous(), B=B_OR.float().contiguous(), scale=1.0)


def _spans(delta: LowRank) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal bases of the delta's columns (M x K) and rows (N x K), without float32 noise."""
    left, right = delta.stored_factors(torch.float64)
    Q_left, R_left = torch.linalg.qr(left)
    Q_right, R_right = torch.linalg.qr(right.T)
    U, sigma, Vh = torch.linalg.svd(R_left @ R_right.T, full_matrices=False)
    K = numerical_rank(sigma)
    return Q_left @ U[:, :K], Q_right @ Vh[:K].T


def _joined(bases: Sequence[torch.Tensor]) -> torch.Tensor | None:
    if len(bases) < 2:
        return bases[0] if bases else None
    U, sigma, _ = torch.linalg.svd(torch.cat(list(bases), dim=1), full_matrices=False)
    return U[:, sigma > NOISE]  # relative to 1, since the columns have unit length
