"""The five steps on the deltas of one place: calibrate -> space -> sparsify -> combine -> compress."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from math import hypot
from threading import Lock, RLock
from typing import cast

import torch

from composer.deltas.delta import Additive, Layout, LowRank, RowwiseDelta
from composer.errors import NotSupported
from composer.formats.recipes.methods import Pipeline
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
from composer.methods.join import Join, joined, one_after_the_other, scaled, sce, sce_weights, stack_factors
from composer.methods.matrix import Largest, Matrix, largest, square_sum
from composer.methods.sparsify import Keep, keeps
from composer.methods.spectral import Compression, compress, compress_dense, iso, product, triples, tsv

_DENSE = RLock()
"""Held by the place that has a matrix of its weight's size in memory: one at a time, however many threads there are."""


@dataclass(frozen=True, slots=True)
class SlotDelta:
    """One adapter's delta at a place: `adapter` is its number among the inputs, `key` what random steps know it by."""

    adapter: int
    delta: Additive
    weight: float
    key: str

    @property
    def low_rank(self) -> LowRank:
        """Raises NotSupported where the delta has no factors."""
        return factored(self.delta)


@dataclass(frozen=True, slots=True)
class WeightSlot:
    """All deltas of one place. `total` is the sum of all adapters' weights there, also of those without a delta."""

    parts: list[SlotDelta]
    total: float
    norm: float | None = None
    """What calibration wants the norm of the result to be."""
    is_prepared: bool = False

    @property
    def module(self) -> str:
        return self.parts[0].delta.module

    @property
    def weights(self) -> list[float]:
        return [part.weight for part in self.parts]


@dataclass(frozen=True, slots=True)
class Selections:
    """What was selected over all of an adapter's places at once (scope=model), by (adapter, place)."""

    largest: Mapping[tuple[int, str, int], Largest] = field(default_factory=dict[tuple[int, str, int], Largest])

    @classmethod
    def over(cls, places: Sequence[WeightSlot], pipeline: Pipeline, settings: Mapping[str, object]) -> "Selections":
        if settings.get("scope") != "model":
            return cls()
        if pipeline.space != "full":
            message = (
                "scope=model counts the entries of dense deltas; this method works in a small basis of each module."
            )
            raise NotSupported("bad_setting", message, subject="scope", next_step="Use ties, or scope=tensor.")
        found: dict[tuple[int, str, int], Largest] = {}
        for adapter in sorted({part.adapter for place in places for part in place.parts}):
            own = [part for place in places for part in place.parts if part.adapter == adapter]
            _refuse_reading(own)
            matrices = [_dense(part.delta, None) for part in own]
            entries = sum(matrix.shape[0] * matrix.shape[1] for matrix in matrices)
            kept = largest(matrices, int(cast(float, settings["density"]) * entries))
            for part, one in zip(own, kept, strict=True):
                found[adapter, part.delta.weight, part.delta.begin] = one
        return cls(found)

    def of(self, part: SlotDelta) -> Largest | None:
        return self.largest.get((part.adapter, part.delta.weight, part.delta.begin))


def _refuse_reading(parts: Sequence[SlotDelta]) -> None:
    for part in parts:
        if isinstance(part.delta, RowwiseDelta) and part.delta.reads_base:
            message = f"scope=model counts all entries beforehand; those of {part.delta.module} depend on the base."
            raise NotSupported("bad_setting", message, subject="scope", next_step="Use scope=tensor.")


def prepared(pipeline: Pipeline, place: WeightSlot, settings: Mapping[str, object]) -> WeightSlot:
    """The place calibrated: what everything after sees."""
    if place.is_prepared or pipeline.calibrate != "pico":
        return place
    norms = [abs(part.weight) * norm_of(pair_of(part.low_rank)) for part in place.parts]
    wanted = sum(norms) / len(norms) if settings["restore"] == "merged" else None
    return replace(_calibrated(place, settings), norm=wanted, is_prepared=True)


def cancelled(pipeline: Pipeline, place: WeightSlot) -> float:
    """How many times smaller than the norm that Pico restores the sum of a prepared place is; 1 of another method,
    and of an election, which sums nothing that cancels."""
    if place.norm is None or pipeline.combine == "elect":
        return 1.0
    return cancellation([pair_of(part.low_rank) for part in place.parts], place.weights, place.norm)


def combine_slot(
    pipeline: Pipeline, place: WeightSlot, settings: Mapping[str, object], selections: Selections
) -> tuple[list[Additive], Compression | None]:
    """What is added at the place, and what compression lost there, if anything was compressed."""
    place = prepared(pipeline, place, settings)
    rank, energy = cast("int | None", settings.get("rank")), cast("float | None", settings.get("energy"))
    if pipeline.compress and rank is None and energy is None:
        rank = _usual_rank(place)
    compressing = rank is not None or energy is not None
    if settings.get("sequential") and not compressing and _reads_base(place):
        return [_in_order(pipeline, place, settings)], None
    if pipeline.space == "full" or (compressing and _plain(pipeline) and _without_factors(place)):
        deltas, lost = _in_full(pipeline, place, settings, selections, (rank, energy) if compressing else None)
    elif pipeline.space == "factors" and not compressing:
        deltas, lost = _summed(pipeline, place, settings), None
    else:
        deltas, lost = _in_basis(pipeline, place, settings, rank, energy)
    factor = cast(float, settings["lambda"])
    if place.norm is not None:
        deltas = _restored(deltas, place.norm)
        lost = None if lost is None else lost.at(lost.norm * restoring_factor(lost.norm, place.norm))
    return [_times(delta, factor) for delta in deltas], None if lost is None else lost.times(factor)


def _usual_rank(place: WeightSlot) -> int:
    ranks = [part.delta.rank for part in place.parts if isinstance(part.delta, LowRank)]
    if not ranks:
        message = f"No input has a rank at {place.module}, so none can be taken over."
        raise NotSupported("no_rank", message, subject=place.module, next_step="Set rank or energy.")
    return max(ranks)


def _plain(pipeline: Pipeline) -> bool:
    """A sum or a mean, which is the same in every space."""
    return pipeline.combine in ("sum", "mean") and pipeline.sparsify == "none" and pipeline.space in ("factors", "core")


def _without_factors(place: WeightSlot) -> bool:
    return any(isinstance(part.delta, RowwiseDelta) for part in place.parts)


def _calibrated(place: WeightSlot, settings: Mapping[str, object]) -> WeightSlot:
    pairs = [pair_of(part.low_rank) for part in place.parts]
    if settings["gauge"] == "canonical":
        # All of Σ in B: what crowds a direction is what is written into it.
        pairs = [canonical(pair, in_output=1.0) for pair in pairs]
    calibrated = pico(pairs)
    if settings["restore"] == "each":
        calibrated = restored(calibrated, [norm_of(pair) for pair in pairs])
    parts = [_with(part, pair) for part, pair in zip(place.parts, calibrated, strict=True)]
    return replace(place, parts=parts)


def _with(part: SlotDelta, pair: Pair) -> SlotDelta:
    return replace(part, delta=_named(part.low_rank, pair))


def _named(like: Additive, pair: Pair) -> LowRank:
    """The factors as a delta of the same place."""
    B_OR, A_RI = (factor.contiguous() for factor in pair)
    if isinstance(like, LowRank):
        return replace(like, A_RI=A_RI, B_OR=B_OR, scale=1.0)
    return LowRank(
        like.module,
        like.weight,
        like.layout,
        A_RI,
        B_OR,
        1.0,
        like.tied,
        like.begin,
        like.kernel,
        like.twin,
        like.stacked,
    )


def _reads_base(place: WeightSlot) -> bool:
    return any(isinstance(part.delta, RowwiseDelta) and part.delta.reads_base for part in place.parts)


def _in_order(pipeline: Pipeline, place: WeightSlot, settings: Mapping[str, object]) -> RowwiseDelta:
    """Each adapter's deltas from what the adapters before it made of the base: only what reads the base is another
    delta for that. The weights are the last ones, since such a delta is not simply scaled."""
    steps: dict[int, list[tuple[Additive, float]]] = {}
    factor = cast(float, settings["lambda"])
    for part, weight in zip(place.parts, _weights(pipeline, place, settings), strict=True):
        steps.setdefault(part.adapter, []).append((part.delta, weight * factor))
    return one_after_the_other(list(steps.values()))


def _weights(pipeline: Pipeline, place: WeightSlot, settings: Mapping[str, object]) -> list[float]:
    if pipeline.combine == "mean" or settings.get("normalize"):
        return [weight / divisor(place.total) for weight in place.weights]
    return place.weights


def _summed(pipeline: Pipeline, place: WeightSlot, settings: Mapping[str, object]) -> list[Additive]:
    weights = _weights(pipeline, place, settings)
    if place.norm is not None:  # that of the sum
        return stack_factors([part.delta for part in place.parts], weights)
    return [_times(part.delta, weight) for part, weight in zip(place.parts, weights, strict=True)]


def _in_basis(
    pipeline: Pipeline, place: WeightSlot, settings: Mapping[str, object], rank: int | None, energy: float | None
) -> tuple[list[Additive], Compression | None]:
    """In a small shared basis: nothing of the weight's size is formed but the factors."""
    like = place.parts[0].low_rank
    pairs = [pair_of(part.low_rank) for part in place.parts]
    known = {"gauge": "raw", **settings}
    space = "core" if pipeline.space == "factors" else pipeline.space
    if pipeline.sparsify == "none" and pipeline.combine != "elect":
        basis = basis_of(space, pairs, known)
    else:  # twice as precise, since an entry that noise decides on is one thing or another
        basis = basis_of(space, [(B.double(), A.double()) for B, A in pairs], known).for_entries()
    if pipeline.combine == "tsv":
        X = tsv(basis.X, place.weights, min(like.stored_shape))
    else:
        X = _thin(pipeline, place, known, basis)
    equal = iso(X) if pipeline.combine == "iso" else None
    missed = _missed(pipeline, place, settings, basis)
    if rank is None and energy is None:
        return [_named(like, basis.lift(X if equal is None else product(equal)))], missed
    pair, lost = compress(place.module, basis, triples(X) if equal is None else equal, rank, energy)
    if missed is not None:
        lost = replace(missed, rank=lost.rank, error=hypot(missed.error, lost.error))
    return [_named(like, pair)], lost


def _missed(pipeline: Pipeline, place: WeightSlot, settings: Mapping[str, object], basis: Basis) -> Compression | None:
    """What a basis that is too small loses: of the sum, where one is made, else of the deltas beforehand."""
    if basis.whole is None:
        return None
    total = divisor(place.total) if pipeline.combine == "mean" or settings.get("normalize") else 1.0
    whole = [C.double() * (weight / total) for C, weight in zip(basis.whole, place.weights, strict=True)]
    kept = [X.double() * (weight / total) for X, weight in zip(basis.X, place.weights, strict=True)]
    if pipeline.combine in ("sum", "mean") and pipeline.sparsify == "none":
        whole, kept = [torch.stack(whole).sum(0)], [torch.stack(kept).sum(0)]
    norm, left = hypot(*(float(C.norm()) for C in whole)), hypot(*(float(X.norm()) for X in kept))
    full_rank = sum(part.low_rank.rank for part in place.parts)
    return Compression(place.module, min(basis.X[0].shape), full_rank, norm, max(0.0, norm**2 - left**2) ** 0.5)


def _thin(pipeline: Pipeline, place: WeightSlot, settings: Mapping[str, object], basis: Basis) -> torch.Tensor:
    matrices = [Matrix.of(X) for X in basis.X]
    keep = keeps(pipeline.sparsify, matrices, [part.key for part in place.parts], settings)
    X_Tpq = torch.stack([keep_i(X, 0) for keep_i, X in zip(keep, basis.X, strict=True)])
    return _join(pipeline, place, settings)(X_Tpq)


def _join(pipeline: Pipeline, place: WeightSlot, settings: Mapping[str, object]) -> Join:
    combine = "mean" if settings.get("normalize") else pipeline.combine
    return joined("sum" if combine == "iso" else combine, place.weights, place.total, settings)


def _in_full(
    pipeline: Pipeline,
    place: WeightSlot,
    settings: Mapping[str, object],
    selections: Selections,
    budget: tuple[int | None, float | None] | None,
) -> tuple[list[Additive], Compression | None]:
    """Entry by entry, so without factors: made row by row when they are written, or compressed here."""
    first = place.parts[0].delta
    reading = _reads_base(place)
    if budget is not None and reading:
        raise no_factors(place.module)
    if budget is not None:
        with _DENSE if _whole(place) else nullcontext():  # what is made whole is held from the first pass on
            matrix = _combined(pipeline, place, settings, selections, None)
            with _DENSE:
                return _compressed(place, matrix, *budget)
    made = _Once(lambda: _combined(pipeline, place, settings, selections, None))

    def rows(W_MN: torch.Tensor, begin: int) -> torch.Tensor:
        matrix = _combined(pipeline, place, settings, selections, W_MN) if reading else made()
        return matrix.rows(begin, begin + W_MN.shape[0]).to(W_MN)

    computed = RowwiseDelta(
        first.module, first.weight, first.stored_shape, rows, reads_base=reading, whole=reading or _whole(place),
        tied=first.tied, twin=first.twin, begin=first.begin, layout=first.layout, kernel=first.kernel,
        stacked=first.stacked,
    )  # fmt: skip
    return [computed], None


def _compressed(
    place: WeightSlot, matrix: Matrix, rank: int | None, energy: float | None
) -> tuple[list[Additive], Compression | None]:
    like = place.parts[0].delta
    (left, right), lost = compress_dense(place.module, matrix, rank, energy)
    B_OR, A_RI = (left, right) if like.layout is Layout.LINEAR else (right.T, left.T)
    return [_named(like, (B_OR, A_RI))], lost


def _whole(place: WeightSlot) -> bool:
    return any(isinstance(part.delta, RowwiseDelta) and part.delta.whole for part in place.parts)


class _Once:
    """A matrix that is decided on when it is first needed, by whichever thread comes first."""

    def __init__(self, make: Callable[[], Matrix]) -> None:
        self._make, self._lock = make, Lock()
        self._made: Matrix | None = None

    def __call__(self) -> Matrix:
        with self._lock:
            if self._made is None:
                self._made = self._make()
            return self._made


def _dense(delta: Additive, W_MN: torch.Tensor | None) -> Matrix:
    """The delta as stored, its rows made when asked for. `W_MN` is the base's whole matrix where the delta reads it."""
    rows, columns = delta.stored_shape
    if isinstance(delta, LowRank):
        left, right = delta.stored_factors()
        return Matrix((rows, columns), lambda first, last: left[first:last] @ right)
    if delta.whole:
        return Matrix.of(delta.rows(torch.zeros(()).expand(rows, columns) if W_MN is None else W_MN, 0).float())

    def make(first: int, last: int) -> torch.Tensor:
        base = torch.zeros(()).expand(last - first, columns) if W_MN is None else W_MN[first:last]
        return delta.rows(base.float(), first)

    return Matrix((rows, columns), make)


def _combined(
    pipeline: Pipeline,
    place: WeightSlot,
    settings: Mapping[str, object],
    selections: Selections,
    W_MN: torch.Tensor | None,
) -> Matrix:
    """Sparsified and joined, as a matrix of its own. What decides about entries is found out here, in passes."""
    weighted = pipeline.combine == "sce"
    matrices = [_dense(_times(part.delta, part.weight) if weighted else part.delta, W_MN) for part in place.parts]
    chosen = [selections.of(part) for part in place.parts]
    keep: list[Keep]
    if all(one is not None for one in chosen):
        keep = [cast(Largest, one).kept for one in chosen]
    else:
        keep = keeps(pipeline.sparsify, matrices, [part.key for part in place.parts], settings)

    def kept(first: int, last: int) -> torch.Tensor:
        return torch.stack([keep_i(X.rows(first, last), first) for keep_i, X in zip(keep, matrices, strict=True)])

    if not weighted:
        join = _join(pipeline, place, settings)
        return Matrix(matrices[0].shape, lambda first, last: join(kept(first, last)))
    sparse = [
        Matrix(X.shape, lambda first, last, X=X, keep_i=keep_i: keep_i(X.rows(first, last), first))
        for X, keep_i in zip(matrices, keep, strict=True)
    ]
    own = sce_weights([square_sum(X) for X in sparse])
    return Matrix(matrices[0].shape, lambda first, last: sce(kept(first, last), own))


def _times(delta: Additive, factor: float) -> Additive:
    if isinstance(delta, LowRank):
        return delta if factor == 1 else replace(delta, scale=delta.scale * factor)
    return scaled(delta, factor)


def _restored(deltas: list[Additive], norm: float) -> list[Additive]:
    """The sum of a place back to the mean norm that its deltas had before calibration."""
    found: list[Additive] = []
    for delta in deltas:
        if isinstance(delta, LowRank):
            now = norm_of(pair_of(delta))
            found.append(_times(delta, restoring_factor(now, norm)))
            continue
        ratio = _Once(lambda delta=delta: _ratio(delta, norm))
        found.append(
            replace(
                delta, rows=lambda W, begin, delta=delta, ratio=ratio: delta.rows(W, begin) * ratio().rows(0, 1).to(W)
            )
        )
    return found


def _ratio(delta: RowwiseDelta, norm: float) -> Matrix:
    now = square_sum(_dense(delta, None)) ** 0.5
    return Matrix.of(torch.tensor([[restoring_factor(now, norm)]]))
