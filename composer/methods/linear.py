"""Sums of deltas, exact and without a dense matrix: the factors are put side by side; or one after the other."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from composer.delta import Additive, Computed, LowRank


def side_by_side(deltas: Sequence[Additive], weights: Sequence[float]) -> list[Additive]:
    """Σ w_i s_i B_i A_i as B = [c_1 B_1 … c_T B_T] (O x R) and A = [A_1; …; A_T] (R x I), R = Σ r_i.

    The deltas are those of one place; weights and scales are folded into B in float32, so the result's scale is 1.
    Deltas without factors keep to themselves, each with its weight.
    """
    weighted = list(zip(deltas, weights, strict=True))
    pairs = [(delta, weight) for delta, weight in weighted if isinstance(delta, LowRank)]
    others = [scaled(delta, weight) for delta, weight in weighted if isinstance(delta, Computed)]
    if not pairs:
        return [*others]
    B_OR = torch.cat([delta.B_OR.float() * (weight * delta.scale) for delta, weight in pairs], dim=1)
    A_RI = torch.cat([delta.A_RI.float() for delta, _ in pairs], dim=0)
    return [*others, replace(pairs[0][0], A_RI=A_RI, B_OR=B_OR, scale=1.0)]


def scaled(delta: Computed, weight: float) -> Computed:
    """The delta times its weight; itself for the weight 1."""
    return delta if weight == 1 else replace(delta, rows=lambda W_MN, begin: delta.rows(W_MN, begin) * weight)


def one_after_the_other(steps: Sequence[Sequence[tuple[Additive, float]]]) -> Computed:
    """The deltas of one place, each with its weight, as one delta: those of a step are taken from W plus all that the
    steps before it added. That is what merging adapter after adapter gives, without its rounding in between."""
    deltas = [delta for step in steps for delta, _ in step]
    first, computed = deltas[0], [delta for delta in deltas if isinstance(delta, Computed)]

    def rows(W_MN: torch.Tensor, begin: int) -> torch.Tensor:
        added_MN = torch.zeros_like(W_MN)
        for step in steps:
            now_MN = W_MN + added_MN
            for delta, weight in step:
                added_MN += weight * _rows(delta, now_MN, begin)
        return added_MN

    return Computed(
        first.module, first.weight, first.stored_shape, rows, reads_base=True, rescales=True,
        whole=any(delta.whole for delta in computed), tied=first.tied, twin=first.twin, begin=first.begin,
        layout=first.layout, kernel=first.kernel, stacked=first.stacked,
        sets_rows=frozenset[int]().union(*(delta.sets_rows for delta in computed)),
    )  # fmt: skip


def _rows(delta: Additive, W_MN: torch.Tensor, begin: int) -> torch.Tensor:
    if isinstance(delta, Computed):
        return delta.rows(W_MN, begin)
    left_MR, right_RN = delta.stored_factors(W_MN.dtype)
    return left_MR[begin : begin + len(W_MN)].to(W_MN.device) @ right_RN.to(W_MN.device)
