"""Sums of low-rank deltas, exact and without a dense matrix: the factors are put side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch

from composer.delta import LowRank
from composer.errors import Mismatch

_SMALLEST_SUM = 1e-8


def stack(parts: Sequence[tuple[LowRank, float]], total_weight: float, settings: Mapping[str, object]) -> LowRank:
    """delta = lambda * Σ w_i s_i B_i A_i, as B = [c_1 B_1 … c_T B_T] (O x R) and A = [A_1; …; A_T] (R x I), R = Σ r_i.

    `parts` are the deltas of one weight with their w_i; the scales are folded into B in float32, so the result's
    scale is 1.
    """
    factor = cast(float, settings["lambda"])
    B_OR = torch.cat([delta.B_OR * (factor * weight * delta.scale) for delta, weight in parts], dim=1)
    A_RI = torch.cat([delta.A_RI for delta, _ in parts], dim=0)
    return replace(parts[0][0], A_RI=A_RI, B_OR=B_OR, scale=1.0)


def linear(parts: Sequence[tuple[LowRank, float]], total_weight: float, settings: Mapping[str, object]) -> LowRank:
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
