"""Joins several deltas of one weight into one: by concatenated factors, or entry by entry.

X_TMN are T deltas (rows of them), w_T their weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar, cast

import torch

from composer.deltas.delta import Additive, Delta, LowRank, Replacement, RowwiseDelta
from composer.errors import NotSupported
from composer.formats.recipes.methods import Elect, MethodSettings
from composer.formats.recipes.weights import divisor

_NOTHING = 1e-3  # of the kept weights' magnitudes

D = TypeVar("D", bound=Delta)
Join = Callable[[torch.Tensor], torch.Tensor]
"""X_TMN -> X_MN."""


def joined(settings: MethodSettings, weights: Sequence[float], total: float) -> Join:
    """The join of T deltas: an election, or else a sum (pipeline.py has `tsv` and `sce`). `total` is the sum of all
    adapters' weights, including those without a delta here."""
    if isinstance(settings, Elect):
        return lambda X_TMN: elect(X_TMN, weights, settings.vote, settings.divide)
    w_T = torch.tensor(weights, dtype=torch.float32)
    if settings.divides:
        w_T = w_T / divisor(total)
    return lambda X_TMN: torch.tensordot(w_T.to(X_TMN.device), X_TMN, dims=1)


def elect(X_TMN: torch.Tensor, w_T: Sequence[float], vote: str = "plain", divide: str = "count") -> torch.Tensor:
    """Elects the sign of each entry by vote and joins the deltas that have it: Σ_kept w_i X_i / D.

    TIES (arXiv 2306.01708) has plain votes, D counts the kept deltas, and w = 1. `count` votes with the signs; a tie
    falls back to the plain vote, since plus would be arbitrary (the signs of a basis are). Zeros do not vote. D may
    also be the sum of the kept weights, or 1 (`none`).

    `weighted` is mergekit's rule (its `get_mask`): votes are w_i X_i, and a delta is kept where w_i X_i has the elected
    sign. A negative weight thus votes and counts as the opposite delta; only D = Σ w_i keeps its sign.
    """
    shares = {"count": [1.0] * len(w_T), "weights": w_T, "none": None}[divide]
    if vote == "weighted" and min(w_T) < 0:
        signs_T = X_TMN.new_tensor(w_T).sign()
        X_TMN, w_T = X_TMN * signs_T[:, None, None], [abs(w) for w in w_T]
    votes_MN = _votes(X_TMN, w_T, vote)
    total_MN, D_MN = _agreeing(X_TMN, w_T, votes_MN, shares)
    if D_MN is None or shares is None:
        return total_MN
    nothing: torch.Tensor | float = 0.0
    if min(shares) < 0 < max(shares):  # weights that cancel cannot be a divisor
        nothing = _NOTHING * cast(torch.Tensor, _agreeing(X_TMN, w_T, votes_MN, [abs(w) for w in shares])[1])
    return total_MN / torch.where(D_MN.abs() <= nothing, 1.0, D_MN)


def _votes(X_TMN: torch.Tensor, w_T: Sequence[float], vote: str) -> torch.Tensor:
    if vote == "weighted":
        return torch.tensordot(X_TMN.new_tensor(w_T), X_TMN, dims=1)
    plain_MN = X_TMN.sum(0)
    if vote == "plain":
        return plain_MN
    count_MN = X_TMN.sign().sum(0)
    return torch.where(count_MN == 0, plain_MN, count_MN)


def _agreeing(
    X_TMN: torch.Tensor, w_T: Sequence[float], votes_MN: torch.Tensor, shares: Sequence[float] | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(Σ w_i X_i, the sum of the shares) over deltas with the elected sign. Works in place, one delta at a time."""
    sign_MN = torch.where(votes_MN >= 0, 1.0, -1.0).to(X_TMN.dtype)
    total_MN = torch.zeros_like(sign_MN)
    D_MN = None if shares is None else torch.zeros_like(sign_MN)
    for i, (X_MN, w) in enumerate(zip(X_TMN, w_T, strict=True)):
        agrees_MN = (X_MN * sign_MN).clamp_(min=0)  # |X| where the signs agree
        total_MN.add_(agrees_MN, alpha=w)
        if D_MN is not None and shares is not None:
            D_MN.add_(agrees_MN.gt_(0), alpha=shares[i])
    return total_MN.mul_(sign_MN), D_MN


def sce_weights(squares: Sequence[float]) -> list[float]:
    """The weights of SCE (arXiv 2408.07990): each delta's share of the energy left by the mask. They sum to 1."""
    total = sum(squares)
    return [square / total if total else 0.0 for square in squares]


def sce(X_TMN: torch.Tensor, w_T: Sequence[float]) -> torch.Tensor:
    """`elect` by a plain vote with SCE's weights, divided by the kept weights unless those are negligible."""
    total_MN, D_MN = _agreeing(X_TMN, w_T, X_TMN.sum(0), w_T)
    return total_MN if D_MN is None else total_MN / D_MN.clamp(min=1e-6)


def stack_factors(deltas: Sequence[Additive], weights: Sequence[float]) -> list[Additive]:
    """Σ w_i s_i B_i A_i as B = [c_1 B_1 … c_T B_T] (O x R) and A = [A_1; …; A_T] (R x I), R = Σ r_i.

    The deltas belong to one slot. Weights and scales are folded into B in float32, so the result's scale is 1. Deltas
    without factors stay separate, each with its weight.
    """
    weighted = list(zip(deltas, weights, strict=True))
    pairs = [(delta, weight) for delta, weight in weighted if isinstance(delta, LowRank)]
    others = [times(delta, weight) for delta, weight in weighted if isinstance(delta, RowwiseDelta)]
    if not pairs:
        return [*others]
    B_OR = torch.cat([delta.B_OR.float() * (weight * delta.scale) for delta, weight in pairs], dim=1)
    A_RI = torch.cat([delta.A_RI.float() for delta, _ in pairs], dim=0)
    return [*others, replace(pairs[0][0], A=A_RI, B=B_OR, scale=1.0)]


def times(delta: D, weight: float) -> D:
    """The delta times its weight; the same object for weight 1, and for a replacement."""
    if weight == 1 or isinstance(delta, Replacement):
        return delta
    if isinstance(delta, LowRank):
        return replace(delta, scale=delta.scale * weight)
    return replace(delta, rows=lambda W_MN, begin: delta.rows(W_MN, begin) * weight)


def one_after_the_other(steps: Sequence[Sequence[tuple[Additive, float]]], *, active: bool = False) -> RowwiseDelta:
    """The weighted deltas of one slot as one delta. Each step's deltas apply to W plus the results of the steps before,
    as if the adapters were merged one after the other, but without rounding in between.

    `active`: as PEFT computes adapters that are active together, and merges them together. A DoRA adapter then scales
    what the adapters before it left, as before, but by the norms of W + s B A, not of the changed weight (PEFT 0.21,
    DoraLinearVariant). Raises NotSupported for other deltas that read W.
    """
    deltas = [delta for step in steps for delta, _ in step]
    first, computed = deltas[0], [delta for delta in deltas if isinstance(delta, RowwiseDelta)]
    for delta in computed if active else ():
        if delta.reads_base and delta.rows_on is None:
            message = f"sequential=active is known for DoRA only, and an adapter of another type reads {delta.weight}."
            raise NotSupported("no_active_order", message, subject=delta.module)

    def rows(W_MN: torch.Tensor, begin: int) -> torch.Tensor:
        added_MN = torch.zeros_like(W_MN)
        for step in steps:
            now_MN = W_MN + added_MN
            for delta, weight in step:
                scales = active and isinstance(delta, RowwiseDelta) and delta.rows_on
                own_MN = scales(W_MN, now_MN, begin) if scales else _rows(delta, now_MN, begin)
                added_MN += weight * own_MN
        return added_MN

    return RowwiseDelta(
        module=first.module, weight=first.weight, stored_shape=first.stored_shape, rows=rows, reads_base=True,
        rescales=True, all_rows=any(delta.all_rows for delta in computed), tied=first.tied, twin=first.twin,
        begin=first.begin, layout=first.layout, kernel=first.kernel, stacked=first.stacked,
        sets_rows=frozenset[int]().union(*(delta.sets_rows for delta in computed)),
    )  # fmt: skip


def _rows(delta: Additive, W_MN: torch.Tensor, begin: int) -> torch.Tensor:
    if isinstance(delta, RowwiseDelta):
        return delta.rows(W_MN, begin)
    left_MR, right_RN = delta.stored_factors(W_MN.dtype)
    return left_MR[begin : begin + len(W_MN)].to(W_MN.device) @ right_RN.to(W_MN.device)
