"""Room for protected inputs: every other delta without its part in their subspaces.

Off the inputs of a protected delta, another no longer reacts to what that one reacts to; off its outputs, it no longer
writes where that one writes. The subspaces are the delta's own, whatever its factors and its size. Shapes, of a delta
as stored: M rows, N columns, r its rank, K directions of all protected ones together. Nothing of M x N is formed.
"""

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import cast, overload

import torch

from composer.deltas.delta import Additive, Delta, Layout, LowRank, Replacement, mapped, names_of
from composer.deltas.lowrank import NOISE, numerical_rank
from composer.deltas.tensors import SpillFile, drop_pages, torch_threads
from composer.deltas.variants.load import LoadedAdapter
from composer.formats.recipes.weights import Weight
from composer.methods.basis import factored, norm_of
from composer.methods.spectral import decomposing
from composer.methods.tied import on_own_head

TOGETHER = 16  # places whose results are in memory at once
_At = tuple[int, int]  # adapter, and the number of the delta among its own


def project_out_protected(
    adapters: Sequence[LoadedAdapter], weights: Sequence[Weight], settings: Mapping[str, object]
) -> list[LoadedAdapter]:
    """The adapters off the subspaces of those that `settings["protect"]` counts from 1; the protected as they are.

    `settings["tied"]` is settled (`treatment_of_tied`). What has the weight 0 protects nothing. Ranks stay; what was
    moved is float32 and waits on the disk, so that memory is that of a few places. Raises NotSupported where a delta
    without factors is protected beside another, or would have to be moved.
    """
    chosen = {position - 1 for position in cast("tuple[int, ...]", settings.get("protect", ()))}
    side, moved, aside = str(settings.get("protect_side")), [dict[int, LowRank]() for _ in adapters], SpillFile()
    shared = _shared(adapters, weights, chosen, str(settings["tied"])) if chosen else []
    if not shared:
        return list(adapters)

    def at(place: Sequence[_At]) -> tuple[list[_At], list[Additive], list[LowRank]]:
        """(the places of what is moved, the inputs, what is moved)."""
        deltas = [(one, cast(Additive, adapters[one[0]].deltas[one[1]])) for one in place]
        with decomposing(deltas[0][1].module):
            room = _Room.beside([delta for (adapter, _), delta in deltas if adapter in chosen], side)
            others = [(one, delta) for one, delta in deltas if one[0] not in chosen]
            made = [room.without(factored(delta)) for _, delta in others]
        return [one for one, _ in others], [delta for _, delta in deltas], made

    with torch_threads(1), ThreadPoolExecutor(max(2, os.cpu_count() or 1), "protect") as pool:
        for begin in range(0, len(shared), TOGETHER):
            for places, inputs, made in list(pool.map(at, shared[begin : begin + TOGETHER])):
                for (adapter, number), delta in zip(places, mapped(aside, made), strict=True):
                    moved[adapter][number] = delta
                drop_pages_of(inputs)
    pairs = zip(adapters, moved, strict=True)
    return [replace(one, deltas=_Moved(one.deltas, own)) if own else one for one, own in pairs]


def drop_pages_of(deltas: Sequence[Additive]) -> None:
    """Of the memory of mapped factors that were looked at."""
    for delta in deltas:
        if isinstance(delta, LowRank):
            drop_pages(delta.A_RI)
            drop_pages(delta.B_OR)


class _Moved(Sequence[Delta]):
    """An adapter's deltas, some of them replaced: the others are made when they are asked for, as before."""

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
    """Where each delta lies of the places that both a protected adapter and another one change."""
    places: dict[tuple[str, int], list[_At]] = defaultdict(list)
    for index, (adapter, weight) in enumerate(zip(adapters, weights, strict=True)):
        for number, found in enumerate(adapter.deltas):
            delta = on_own_head(found) if tied == "untie" else found
            if not isinstance(delta, Replacement) and (index not in chosen or weight.of(*names_of(delta))):
                places[delta.weight, delta.begin].append((index, number))
    return [own for own in places.values() if len({adapter in chosen for adapter, _ in own}) == 2]


@dataclass(frozen=True, slots=True)
class _Room:
    """What is taken: orthonormal columns over the rows (M x K) and over the columns (N x K), float64, or nothing."""

    rows: torch.Tensor | None
    columns: torch.Tensor | None

    @classmethod
    def beside(cls, protected: Sequence[Additive], side: str) -> "_Room":
        """Each delta's own bases first: beside a larger one a small one would not be seen."""
        rows, columns = list[torch.Tensor](), list[torch.Tensor]()
        for delta in map(factored, protected):
            U, V = _spans(delta)
            if side == "both" or (side == "output") == (delta.layout is Layout.LINEAR):
                rows.append(U)
            if side == "both" or (side == "input") == (delta.layout is Layout.LINEAR):
                columns.append(V)
        return cls(_joined(rows), _joined(columns))

    def without(self, delta: LowRank) -> LowRank:
        """The delta off what is taken. What is then no more than noise becomes zero: its direction would be chance."""
        left, right = delta.stored_factors(torch.float64)
        before = norm_of((left, right))
        if self.rows is not None:
            left = left - self.rows @ (self.rows.T @ left)
        if self.columns is not None:
            right = right - (right @ self.columns) @ self.columns.T
        if norm_of((left, right)) <= NOISE * before:
            left = torch.zeros_like(left)
        B_OR, A_RI = (left, right) if delta.layout is Layout.LINEAR else (right.T, left.T)
        return replace(delta, A_RI=A_RI.float().contiguous(), B_OR=B_OR.float().contiguous(), scale=1.0)


def _spans(delta: LowRank) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal bases of the delta's columns (M x K) and rows (N x K), without directions that are float32 noise."""
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
    return U[:, sigma > NOISE]  # of unit columns: a share of 1
