"""Sums of deltas, exact and without a dense matrix: the factors are put side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch

from composer.delta import Additive, Computed, LowRank
from composer.errors import Mismatch

_SMALLEST_SUM = 1e-8


def stack(
    parts: Sequence[tuple[Additive, float]], total_weight: float, settings: Mapping[str, object]
) -> list[Additive]:
    """delta = lambda * Σ w_i s_i B_i A_i, as B = [c_1 B_1 … c_T B_T] (O x R) and A = [A_1; …; A_T] (R x I), R = Σ r_i.

    `parts` are the deltas of one place with their w_i; the scales are folded into B in float32, so the result's
    scale is 1. Deltas without factors keep to themselves, each with its weight.
    """
    factor = cast(float, settings["lambda"])
    pairs = [(delta, factor * weight) for delta, weight in parts if isinstance(delta, LowRank)]
    others = [scaled(delta, factor * weight) for delta, weight in parts if isinstance(delta, Computed)]
    if not pairs:
        return [*others]
    B_OR = torch.cat([delta.B_OR * (weight * delta.scale) for delta, weight in pairs], dim=1)
    A_RI = torch.cat([delta.A_RI for delta, _ in pairs], dim=0)
    return [*others, replace(pairs[0][0], A_RI=A_RI, B_OR=B_OR, scale=1.0)]


def scaled(delta: Computed, weight: float) -> Computed:
    """The delta times its weight; itself for the weight 1."""
    return delta if weight == 1 else replace(delta, rows=lambda W_MN, begin: delta.rows(W_MN, begin) * weight)


def linear(
    parts: Sequence[tuple[Additive, float]], total_weight: float, settings: Mapping[str, object]
) -> list[Additive]:
    """`stack`; with `normalize`, divided by the sum of all adapters' weights, whether or not they touch this module.

    Raises Mismatch when that sum is below 1e-8 in magnitude.
    """
    if not settings["normalize"]:
        return stack(parts, total_weight, settings)
    if abs(total_weight) < _SMALLEST_SUM:
        message = f"The weights add up to {total_weight:g}; a mean over them does not exist."
        raise Mismatch(
            "zero_weight_sum", message, subject="normalize", next_step="Change a weight, or leave normalize out."
        )
    return stack([(delta, weight / total_weight) for delta, weight in parts], total_weight, settings)
