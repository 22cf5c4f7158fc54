"""The retention of adapters in a combination M, from the deltas alone.

Of adapter i: <M, Δ_i> / |Δ_i|², the weight with which Δ_i alone explains most of M; for a plain sum of orthogonal
deltas, its own weight. Of the sum S = Σ w_i Δ_i, with the method's own factors in w_i: 1 - |S - M| / |S|. Both are over
the whole model, the first also by module.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch

from composer.deltas.delta import Additive, Delta, LowRank, RowwiseDelta, names_of
from composer.deltas.lowrank import Grams
from composer.deltas.tensors import CPU, torch_threads, workers_on
from composer.deltas.variants.load import LoadedAdapter
from composer.findings import Finding, Severity
from composer.formats.checkpoints.numeric import Float64
from composer.formats.recipes.methods import AnySettings, Pipeline, effective_weights
from composer.formats.recipes.weights import Weight
from composer.methods.combine import CombinedDeltas
from composer.methods.protect import drop_pages_of
from composer.methods.structural import is_tied_duplicate

MAX_DENSE_ENTRIES = 1 << 28
"""Full-space methods compute every entry, here and again in the merge. Beyond this many, they are skipped here."""
LEAST_OF_SUM = 0.5
"""A cut to a rank that keeps less than this share of what was cut is a finding."""
LEAST_OF_MEMBER = 0.1
"""An adapter that keeps less than this share of its own weight is a finding."""
_BLOCK_ENTRIES = 1 << 22
_COMMIT = re.compile(r"[0-9a-f]{40,64}")
_PLAIN = (Pipeline(), Pipeline(combine="mean"))

_Slot = tuple[str, int, tuple[int, int]]
"""Module, first row and shape: a bias belongs to the module of its weight."""


@dataclass(frozen=True, slots=True)
class KeptAdapter:
    """The part of one adapter that is left. `weight` is its effective weight, averaged over the energy of its modules:
    the retention that it would have alone. `retention` is None for an adapter without factors, or if it is not
    known."""

    name: str
    weight: float
    retention: float | None = None
    modules: Mapping[str, float] | None = None

    def to_json(self) -> dict[str, Any]:
        modules = {module: round(share, 4) for module, share in (self.modules or {}).items()}
        known = None if self.retention is None else round(self.retention, 6)
        return {"name": self.name, "weight": round(self.weight, 6), "retention": known, "modules": modules}

    @property
    def words(self) -> str:
        name = self.name[:12] if _COMMIT.fullmatch(self.name) else self.name
        own = "" if abs(self.weight - 1) < 0.005 else f" (weight {self.weight:.2g})"
        return f"{name} {_percent(self.retention or 0.0)}{own}"


@dataclass(frozen=True, slots=True)
class Retention:
    """The retention of the weighted sum of the adapters, and of each of them. `of_sum` is None where an
    adapter has no factors, or where the result depends on the base or is too large to compute twice. A `fitted`
    method gets no words, since its weights do not tell: RegMean kept nearly all answers and 0 % of the sum."""

    of_sum: float | None
    members: tuple[KeptAdapter, ...]
    fitted: bool = False

    @property
    def words(self) -> str:
        """`keeps 43 % of the sum; sql 61 %, terraform 22 %`; empty if the weights tell nothing."""
        if self.fitted:
            return ""
        known = ", ".join(member.words for member in self.members if member.retention is not None)
        if self.of_sum is None:
            return f"keeps {known}" if known else ""
        return f"keeps {_percent(self.of_sum)} of the sum; {known}" if known else ""

    def to_json(self) -> dict[str, Any]:
        known = None if self.of_sum is None else round(self.of_sum, 6)
        return {"of_sum": known, "words": self.words, "adapters": [member.to_json() for member in self.members]}

    def findings(self, method: str, lost: float) -> list[Finding]:
        """`little_kept` for the cut, which lost that share of the norm, and for each adapter that is nearly gone."""
        findings: list[Finding] = []
        if 1 - lost < LEAST_OF_SUM:
            message = (
                f"The cut to a rank loses {lost:.0%} of what {method} makes{f': it {self.words}' if self.words else ''}"
                ". Give a higher rank, or use a method that cuts nothing (stack, mean)."
            )
            findings.append(Finding("little_kept", Severity.WARNING, method, message, 1 - lost))
        for member in self.members:
            if self.fitted or member.retention is None or not member.weight:
                continue
            share = member.retention / member.weight
            if share < LEAST_OF_MEMBER:
                message = (
                    f"{method} keeps {member.retention:.3g} of {member.name}, whose weight is {member.weight:.3g}. "
                    "Measure it on the adapter's task, or use another method."
                )
                findings.append(Finding("little_kept", Severity.WARNING, member.name, message, share))
        return findings


def is_sum(settings: AnySettings) -> bool:
    """Whether the method adds the weighted deltas as they are."""
    return settings.pipeline in _PLAIN and not settings.alters


def too_large(adapters: Sequence[LoadedAdapter]) -> bool:
    """Whether the dense deltas of all slots together would have too many entries."""
    shapes = {
        (delta.module, delta.begin): delta.stored_shape
        for adapter in adapters
        for delta in adapter.deltas
        if isinstance(delta, RowwiseDelta | LowRank)
    }
    return sum(rows * columns for rows, columns in shapes.values()) > MAX_DENSE_ENTRIES


def retention_of(
    adapters: Sequence[LoadedAdapter],
    weights: Sequence[Weight | float],
    settings: AnySettings,
    combined: CombinedDeltas | None = None,
) -> Retention:
    """The retention of the adapters in `combined`, which the method made of them; without it, that in a sum."""
    own = effective_weights(weights, settings)
    made = [delta for delta in (combined.deltas if combined else ()) if isinstance(delta, RowwiseDelta | LowRank)]
    computed = [delta for delta in made if isinstance(delta, RowwiseDelta)]
    if any(delta.reads_base for delta in computed) or (computed and too_large(adapters)):
        return unknown(adapters, own)
    tied = (combined.tied if combined else settings.tied) == "untie"
    deltas = [
        [delta for delta in adapter.deltas if tied or not is_tied_duplicate(delta)] for adapter in adapters
    ]  # the other side of a tied weight is not added
    plain = is_sum(settings) and not computed

    def at(there: tuple[_Slot, list[tuple[int, LowRank]], list[Additive]]) -> tuple[_Slot, _Sums]:
        slot, held, kept = there
        one = _sums(held, [own[i].of(*names_of(delta)) for i, delta in held], None if plain else kept)
        drop_pages_of([*(delta for _, delta in held), *kept])
        return slot, one

    with torch_threads(1), ThreadPoolExecutor(workers_on(CPU), "retention") as pool:
        sums = list(pool.map(at, _slots(deltas, made)))
    has_factors = not any(isinstance(delta, RowwiseDelta) for delta in chain.from_iterable(deltas))
    square, error = (sum(getattr(one, name) for _, one in sums) for name in ("square", "error"))
    of_sum = max(0.0, 1 - (max(0.0, error) / square) ** 0.5) if square > 0 and has_factors else None
    members = tuple(_member(index, adapter.name, sums) for index, adapter in enumerate(adapters))
    return Retention(of_sum, members, settings.pipeline.fitted)


def unknown(adapters: Sequence[LoadedAdapter], weights: Sequence[Weight]) -> Retention:
    """The retention where it is not known."""
    return Retention(
        None, tuple(KeptAdapter(adapter.name, weight.value) for adapter, weight in zip(adapters, weights, strict=True))
    )


@dataclass(frozen=True, slots=True)
class _Sums:
    """One slot: for each adapter there <M, Δ>, |Δ|² and w |Δ|²; |S|² and |S - M|²."""

    products: Mapping[int, float]
    energies: Mapping[int, float]
    weighted: Mapping[int, float]
    square: float
    error: float


def _slots(
    adapters: Sequence[Sequence[Delta]], combined: Sequence[Additive]
) -> Iterator[tuple[_Slot, list[tuple[int, LowRank]], list[Additive]]]:
    """(slot, the factors of the adapters there by index, what the combination adds there)."""
    merged: dict[_Slot, list[Additive]] = defaultdict(list)
    for delta in combined:
        merged[delta.module, delta.begin, delta.stored_shape].append(delta)
    held: dict[_Slot, list[tuple[int, LowRank]]] = defaultdict(list)
    for index, deltas in enumerate(adapters):
        for delta in deltas:
            if isinstance(delta, LowRank):
                held[delta.module, delta.begin, delta.stored_shape].append((index, delta))
    for slot, there in held.items():
        yield slot, there, merged[slot]


def _sums(held: Sequence[tuple[int, LowRank]], weights: Sequence[float], made: Sequence[Additive] | None) -> _Sums:
    """The sums of one slot; `made` is None for the sum itself."""
    deltas, w = [delta for _, delta in held], np.array(weights)
    if made is None:
        inner = Grams.of(deltas).inner()
        products, error = inner @ w, 0.0
    else:
        factors = [delta for delta in made if isinstance(delta, LowRank)]
        dense, energy = _dense_products([delta for delta in made if isinstance(delta, RowwiseDelta)], deltas + factors)
        count, everything = len(deltas), Grams.of(deltas + factors).inner()
        inner, products = everything[:count, :count], everything[:count, count:].sum(1) + dense[:count]
        own = float(everything[count:, count:].sum() + 2 * dense[count:].sum()) + energy  # |M|²
        error = float(w @ inner @ w - 2 * (w @ products)) + own
    indices = [index for index, _ in held]
    squares = inner.diagonal()
    rows = [dict(zip(indices, values.tolist(), strict=True)) for values in (products, squares, squares * w)]
    return _Sums(*rows, square=float(w @ inner @ w), error=error)


def _dense_products(computed: Sequence[RowwiseDelta], deltas: Sequence[LowRank]) -> tuple[Float64, float]:
    """(<D, Δ> for each delta, |D|²) for the sum D of what is computed, in one pass over its rows."""
    products, energy = np.zeros(len(deltas)), 0.0
    if not computed:
        return products, energy
    factors = [delta.stored_factors() for delta in deltas]
    rows, columns = computed[0].stored_shape
    step = rows if any(delta.all_rows for delta in computed) else max(1, _BLOCK_ENTRIES // columns)
    for begin in range(0, rows, step):
        # Any W will do: these deltas do not read the base.
        W = torch.zeros(()).expand(min(step, rows - begin), columns)
        made = torch.stack([delta.rows(W, begin).float() for delta in computed]).sum(0)
        energy += float(made.square().sum(dtype=torch.float64))
        for index, (left, right) in enumerate(factors):
            products[index] += float((made @ right.T * left[begin : begin + len(W)]).sum(dtype=torch.float64))
    return products, energy


def _member(index: int, name: str, sums: Sequence[tuple[_Slot, _Sums]]) -> KeptAdapter:
    """Adds up one adapter over the slots, and over those of each module."""
    own = [(module, one) for (module, _, _), one in sums if index in one.energies]
    by_module: dict[str, list[_Sums]] = defaultdict(list)
    for module, one in own:
        by_module[module].append(one)

    def quotient(parts: Sequence[_Sums], weighted: bool = False) -> float | None:
        energy = sum(piece.energies[index] for piece in parts)
        part = sum((piece.weighted if weighted else piece.products)[index] for piece in parts)
        return part / energy if energy > 0 else None

    everything = [one for _, one in own]
    modules = {module: share for module, parts in by_module.items() if (share := quotient(parts)) is not None}
    return KeptAdapter(name, quotient(everything, weighted=True) or 0.0, quotient(everything), modules)


def _percent(share: float) -> str:
    return f"{round(100 * share):d} %"  # of -0.001, 0 and not -0
