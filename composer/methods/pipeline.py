"""The five steps on the deltas of one slot: calibrate -> space -> sparsify -> combine -> compress."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from math import hypot
from threading import Lock, RLock
from typing import cast

import torch

from composer.deltas.delta import Additive, Layout, LowRank, RowwiseDelta
from composer.deltas.tensors import CPU, wait_for
from composer.errors import NotSupported
from composer.formats.recipes.methods import Compressed, Magnitude, MethodSettings, Pico, Pipeline
from composer.formats.recipes.weights import divisor
from composer.methods.basis import (
    Basis,
    Pair,
    basis_of,
    cancellation,
    canonical,
    factored,
    no_factors,
    norm_of,
    pair_of,
    pico,
    restored,
    restoring_factor,
)
from composer.methods.join import joined, one_after_the_other, sce, sce_weights, stack_factors, times
from composer.methods.matrix import Largest, Matrix, largest, square_sum
from composer.methods.sparsify import Keep, keeps
from composer.methods.spectral import Compression, compress, compress_dense, iso, product, triples, tsv

_OF_DIRECTIONS = ("sum", "mean", "tsv", "iso")
"""The values of `combine` that decide nothing about single entries, where noise could flip a decision."""
_DENSE = RLock()
"""Held while a slot has a matrix of its weight's size in memory: one slot at a time, in any number of threads."""


@dataclass(frozen=True, slots=True)
class SlotDelta:
    """One adapter's delta at a slot. `adapter` is its index among the inputs; `key` identifies it for random steps."""

    adapter: int
    delta: Additive
    weight: float
    key: str

    @property
    def low_rank(self) -> LowRank:
        """The delta if it has factors. Raises NotSupported otherwise."""
        return factored(self.delta)

    def to(self, device: torch.device) -> "SlotDelta":
        return replace(self, delta=self.delta.to(device)) if isinstance(self.delta, LowRank) else self


@dataclass(frozen=True, slots=True)
class WeightSlot:
    """All deltas of one slot. `total` is the sum of all adapters' weights there, including those without a delta."""

    parts: list[SlotDelta]
    total: float
    norm: float | None = None
    """The norm that calibration wants for the result."""
    is_prepared: bool = False

    @property
    def module(self) -> str:
        return self.parts[0].delta.module

    @property
    def weights(self) -> list[float]:
        return [part.weight for part in self.parts]

    def to(self, device: torch.device) -> "WeightSlot":
        """The slot with its factors on a device; rows are made on the device of the weight anyway."""
        return replace(self, parts=[part.to(device) for part in self.parts])


@dataclass(frozen=True, slots=True)
class Selections:
    """Selections over all of an adapter's slots at once (scope=model), by (adapter, slot)."""

    largest: Mapping[tuple[int, str, int], Largest] = field(default_factory=dict[tuple[int, str, int], Largest])

    @classmethod
    def over(cls, slots: Sequence[WeightSlot], settings: MethodSettings, device: torch.device = CPU) -> "Selections":
        """With `scope=model`, selects each adapter's largest entries over all slots on the device; otherwise selects
        nothing. Raises NotSupported for methods in a small basis."""
        if not isinstance(settings, Magnitude) or settings.scope != "model":
            return cls()
        if settings.pipeline.space != "full":
            message = (
                "scope=model selects entries of dense deltas, but this method works in a small basis of each module."
            )
            raise NotSupported("bad_setting", message, subject="scope", next_step="Use ties, or scope=tensor.")
        selected: dict[tuple[int, str, int], Largest] = {}
        for adapter in sorted({part.adapter for slot in slots for part in slot.parts}):
            own = [part for slot in slots for part in slot.parts if part.adapter == adapter]
            for part in own:
                if isinstance(part.delta, RowwiseDelta) and part.delta.reads_base:
                    message = (
                        f"scope=model selects entries in advance, but those of {part.delta.module} depend on the base."
                    )
                    raise NotSupported("bad_setting", message, subject="scope", next_step="Use scope=tensor.")
            matrices = [_dense(part.to(device).delta, nothing(part.delta, device)) for part in own]
            entries = sum(matrix.shape[0] * matrix.shape[1] for matrix in matrices)
            kept = largest(matrices, int(settings.density * entries))
            for part, selection in zip(own, kept, strict=True):
                selected[adapter, part.delta.weight, part.delta.begin] = selection
        return cls(selected)

    def of(self, part: SlotDelta) -> Largest | None:
        """The selection for one delta; None unless `scope=model`."""
        return self.largest.get((part.adapter, part.delta.weight, part.delta.begin))


def prepared(slot: WeightSlot, settings: MethodSettings) -> WeightSlot:
    """The slot after calibration, as all later steps see it."""
    if slot.is_prepared or not isinstance(settings, Pico):
        return slot
    norms = [abs(part.weight) * norm_of(pair_of(part.low_rank)) for part in slot.parts]
    wanted = sum(norms) / len(norms) if settings.restore == "merged" else None
    return replace(_calibrated(slot, settings), norm=wanted, is_prepared=True)


def cancelled(slot: WeightSlot, settings: MethodSettings) -> float:
    """The factor by which the sum of a prepared slot is smaller than the norm that Pico restores. 1 for other methods
    and for an election, which sums nothing that cancels."""
    if slot.norm is None or settings.pipeline.combine == "elect":
        return 1.0
    return cancellation([pair_of(part.low_rank) for part in slot.parts], slot.weights, slot.norm)


def computes(settings: Compressed) -> bool:
    """Whether a combination computes its factors at once. Otherwise it only joins them, or every entry is decided when
    its row is written, on the device of the weight."""
    pipeline = settings.pipeline
    return isinstance(settings, Pico) or settings.cuts or pipeline.compress or pipeline.space not in ("full", "factors")


def combine_slot(
    slot: WeightSlot, settings: Compressed, selections: Selections
) -> tuple[list[Additive], Compression | None]:
    """The deltas to add at the slot, and the loss from compression, if there was any. Factors are computed on the
    slot's device."""
    slot, pipeline, factor = prepared(slot, settings), settings.pipeline, settings.factor
    if pipeline.compress and not settings.cuts:
        settings = settings.model_copy(update={"rank": _usual_rank(slot)})
    if settings.in_order and not settings.cuts and _reads_base(slot):
        return [_in_order(slot, settings)], None
    if pipeline.space == "full" or (
        settings.cuts and _plain(pipeline) and any(isinstance(part.delta, RowwiseDelta) for part in slot.parts)
    ):
        deltas, lost = _in_full(slot, settings, selections)
    elif pipeline.space == "factors" and not settings.cuts:
        deltas, lost = _summed(slot, settings), None
    else:
        deltas, lost = _in_basis(slot, settings)
    if slot.norm is not None:
        deltas = _restored(deltas, slot.norm)
        lost = None if lost is None else lost.at(lost.norm * restoring_factor(lost.norm, slot.norm))
    return [times(delta, factor) for delta in deltas], None if lost is None else lost.times(factor)


def _usual_rank(slot: WeightSlot) -> int:
    ranks = [part.delta.rank for part in slot.parts if isinstance(part.delta, LowRank)]
    if not ranks:
        message = f"No input has a rank at {slot.module}, so there is no default rank."
        raise NotSupported("no_rank", message, subject=slot.module)
    return max(ranks)


def _plain(pipeline: Pipeline) -> bool:
    """Whether the join is a sum or a mean, which is the same in every space."""
    return pipeline.combine in ("sum", "mean") and pipeline.sparsify == "none" and pipeline.space in ("factors", "core")


def _calibrated(slot: WeightSlot, settings: Pico) -> WeightSlot:
    pairs = [pair_of(part.low_rank) for part in slot.parts]
    if settings.gauge == "canonical":
        # All of Σ goes into B: a direction is crowded by what is written into it.
        pairs = [canonical(pair, in_output=1.0) for pair in pairs]
    calibrated = pico(pairs)
    if settings.restore == "each":
        calibrated = restored(calibrated, [norm_of(pair) for pair in pairs])
    parts = [
        replace(part, delta=_named(part.low_rank, pair)) for part, pair in zip(slot.parts, calibrated, strict=True)
    ]
    return replace(slot, parts=parts)


def _named(like: Additive, pair: Pair) -> LowRank:
    """The factors as a delta of the same slot."""
    B_OR, A_RI = (factor.contiguous() for factor in pair)
    if isinstance(like, LowRank):
        return replace(like, A=A_RI, B=B_OR, scale=1.0)
    return LowRank(
        module=like.module,
        weight=like.weight,
        layout=like.layout,
        A=A_RI,
        B=B_OR,
        scale=1.0,
        tied=like.tied,
        begin=like.begin,
        kernel=like.kernel,
        twin=like.twin,
        stacked=like.stacked,
    )


def _reads_base(slot: WeightSlot) -> bool:
    return any(isinstance(part.delta, RowwiseDelta) and part.delta.reads_base for part in slot.parts)


def _in_order(slot: WeightSlot, settings: Compressed) -> RowwiseDelta:
    """Applies each adapter's deltas to the base as changed by the adapters before it, which matters only for deltas
    that read the base. Uses the final weights, since such deltas do not scale linearly."""
    steps: dict[int, list[tuple[Additive, float]]] = {}
    for part, weight in zip(slot.parts, _weights(slot, settings), strict=True):
        steps.setdefault(part.adapter, []).append((part.delta, weight * settings.factor))
    return one_after_the_other(list(steps.values()), active=settings.as_active)


def _weights(slot: WeightSlot, settings: Compressed) -> list[float]:
    if settings.divides:
        return [weight / divisor(slot.total) for weight in slot.weights]
    return slot.weights


def _summed(slot: WeightSlot, settings: Compressed) -> list[Additive]:
    weights = _weights(slot, settings)
    if slot.norm is not None:  # the norm is that of the sum
        return stack_factors([part.delta for part in slot.parts], weights)
    return [times(part.delta, weight) for part, weight in zip(slot.parts, weights, strict=True)]


def _in_basis(slot: WeightSlot, settings: Compressed) -> tuple[list[Additive], Compression | None]:
    """Combines in a small shared basis; apart from the factors, nothing of the weight's size is formed."""
    like, pipeline = slot.parts[0].low_rank, settings.pipeline
    pairs = [pair_of(part.low_rank) for part in slot.parts]
    if pipeline.sparsify == "none" and pipeline.combine in _OF_DIRECTIONS:
        basis = basis_of(settings, pairs)
    else:  # twice as precise
        basis = basis_of(settings, [(B.double(), A.double()) for B, A in pairs]).for_entries()
    if pipeline.combine == "tsv":
        X = tsv(basis.X, slot.weights, min(like.stored_shape))
    else:
        matrices = [Matrix.of(X) for X in basis.X]
        keep = keeps(settings, matrices, [part.key for part in slot.parts])
        X_Tpq = torch.stack([keep_i(X, 0) for keep_i, X in zip(keep, basis.X, strict=True)])
        X = joined(settings, slot.weights, slot.total)(X_Tpq)
    equal = iso(X) if pipeline.combine == "iso" else None
    missed = _missed(slot, settings, basis)
    if not settings.cuts:
        return [_named(like, basis.lift(X if equal is None else product(equal)))], missed
    pair, lost = compress(slot.module, basis, triples(X) if equal is None else equal, settings.rank, settings.energy)
    if missed is not None:
        lost = replace(missed, rank=lost.rank, error=hypot(missed.error, lost.error))
    return [_named(like, pair)], lost


def _missed(slot: WeightSlot, settings: Compressed, basis: Basis) -> Compression | None:
    """The loss from a basis that is too small: for the sum, if there is one, else for the separate deltas."""
    if basis.exact is None:
        return None
    total, pipeline = divisor(slot.total) if settings.divides else 1.0, settings.pipeline
    exact = [C.double() * (weight / total) for C, weight in zip(basis.exact, slot.weights, strict=True)]
    kept = [X.double() * (weight / total) for X, weight in zip(basis.X, slot.weights, strict=True)]
    if pipeline.combine in ("sum", "mean") and pipeline.sparsify == "none":
        exact, kept = [torch.stack(exact).sum(0)], [torch.stack(kept).sum(0)]
    norm, left = hypot(*(float(C.norm()) for C in exact)), hypot(*(float(X.norm()) for X in kept))
    full_rank = sum(part.low_rank.rank for part in slot.parts)
    return Compression(slot.module, min(basis.X[0].shape), full_rank, norm, max(0.0, norm**2 - left**2) ** 0.5)


def _in_full(
    slot: WeightSlot, settings: Compressed, selections: Selections
) -> tuple[list[Additive], Compression | None]:
    """Combines entry by entry, so without factors: rows are made when written, or the matrix is compressed here."""
    first = slot.parts[0].delta
    reading = _reads_base(slot)
    if settings.cuts and reading:
        raise no_factors(slot.module)
    if settings.cuts:
        with (
            _DENSE if _needs_all_rows(slot) else nullcontext()
        ):  # a delta made all at once stays in memory from the first pass on
            matrix = _combined(slot, settings, selections, nothing(first, _device_of(slot)))
            with _DENSE:
                like = slot.parts[0].delta
                (left, right), lost = compress_dense(
                    slot.module, matrix, settings.rank, settings.energy, _device_of(slot)
                )
                B_OR, A_RI = (left, right) if like.layout is Layout.LINEAR else (right.T, left.T)
                return [_named(like, (B_OR, A_RI))], lost
    kept = slot.to(CPU)  # until the merge, on whatever device that is
    made = _Once(lambda device: _combined(kept.to(device), settings, selections, nothing(first, device)))

    def rows(W_MN: torch.Tensor, begin: int) -> torch.Tensor:
        device = W_MN.device
        matrix = _combined(kept.to(device), settings, selections, W_MN) if reading else made(device)
        return matrix.rows(begin, begin + W_MN.shape[0]).to(W_MN)

    computed = RowwiseDelta(
        module=first.module, weight=first.weight, stored_shape=first.stored_shape, rows=rows, reads_base=reading,
        all_rows=reading or _needs_all_rows(slot), tied=first.tied, twin=first.twin, begin=first.begin,
        layout=first.layout, kernel=first.kernel, stacked=first.stacked,
    )  # fmt: skip
    return [computed], None


def _needs_all_rows(slot: WeightSlot) -> bool:
    return any(isinstance(part.delta, RowwiseDelta) and part.delta.all_rows for part in slot.parts)


class _Once:
    """A matrix that the first thread that needs it makes on a device."""

    def __init__(self, make: Callable[[torch.device], Matrix]) -> None:
        self._make, self._lock = make, Lock()
        self._made: dict[torch.device, Matrix] = {}

    def __call__(self, device: torch.device) -> Matrix:
        with self._lock:
            if device not in self._made:
                self._made[device] = self._make(device)
                wait_for(device)
            return self._made[device]


def nothing(delta: Additive, device: torch.device) -> torch.Tensor:
    """A base matrix of zeros, for deltas that do not read the base; it occupies no memory."""
    return torch.zeros((), device=device).expand(delta.stored_shape)


def _device_of(slot: WeightSlot) -> torch.device:
    """The device of the slot's factors; the CPU if it has none."""
    factors = (part.delta.A_RI.device for part in slot.parts if isinstance(part.delta, LowRank))
    return next(factors, CPU)


def _dense(delta: Additive, W_MN: torch.Tensor) -> Matrix:
    """The delta as stored, with rows made on demand. `W_MN` is the complete base matrix, on the delta's device."""
    rows, columns = delta.stored_shape
    if isinstance(delta, LowRank):
        left, right = delta.stored_factors()
        return Matrix((rows, columns), lambda first, last: left[first:last] @ right)
    if delta.all_rows:
        return Matrix.of(delta.rows(W_MN, 0).float())
    return Matrix((rows, columns), lambda first, last: delta.rows(W_MN[first:last].float(), first))


def _combined(slot: WeightSlot, settings: Compressed, selections: Selections, W_MN: torch.Tensor) -> Matrix:
    """The sparsified and joined matrix, on the device of `W_MN` and the slot's factors. The selections and signs are
    determined here, in passes."""
    weighted = settings.pipeline.combine == "sce"
    matrices = [_dense(times(part.delta, part.weight) if weighted else part.delta, W_MN) for part in slot.parts]
    chosen = [selections.of(part) for part in slot.parts]
    keep: list[Keep]
    if all(selection is not None for selection in chosen):
        keep = [cast(Largest, selection).kept for selection in chosen]
    else:
        keep = keeps(settings, matrices, [part.key for part in slot.parts])

    def kept(first: int, last: int) -> torch.Tensor:
        return torch.stack([keep_i(X.rows(first, last), first) for keep_i, X in zip(keep, matrices, strict=True)])

    if not weighted:
        join = joined(settings, slot.weights, slot.total)
        return Matrix(matrices[0].shape, lambda first, last: join(kept(first, last)))
    sparse = [
        Matrix(X.shape, lambda first, last, X=X, keep_i=keep_i: keep_i(X.rows(first, last), first))
        for X, keep_i in zip(matrices, keep, strict=True)
    ]
    own = sce_weights([square_sum(X) for X in sparse])
    return Matrix(matrices[0].shape, lambda first, last: sce(kept(first, last), own))


def _restored(deltas: list[Additive], norm: float) -> list[Additive]:
    """The deltas scaled so that the slot's sum has the mean norm from before calibration."""
    restored: list[Additive] = []
    for delta in deltas:
        if isinstance(delta, LowRank):
            now = norm_of(pair_of(delta))
            restored.append(times(delta, restoring_factor(now, norm)))
            continue
        ratio = _Once(lambda device, delta=delta: _ratio(delta, norm, device))
        restored.append(
            replace(
                delta,
                rows=lambda W, begin, delta=delta, ratio=ratio: delta.rows(W, begin) * ratio(W.device).rows(0, 1).to(W),
            )
        )
    return restored


def _ratio(delta: RowwiseDelta, norm: float, device: torch.device) -> Matrix:
    now = square_sum(_dense(delta, nothing(delta, device))) ** 0.5
    return Matrix.of(torch.full((1, 1), restoring_factor(now, norm), device=device))
