"""Several deltas of one place -> one, entry by entry. X_TMN are T deltas (rows of them), w_T their weights."""

from collections.abc import Callable, Mapping, Sequence

import torch

from composer.errors import Mismatch

SMALLEST_SUM = 1e-8

Join = Callable[[torch.Tensor], torch.Tensor]
"""X_TMN -> X_MN."""


def joined(step: str, weights: Sequence[float], total: float, settings: Mapping[str, object]) -> Join:
    """The join of T deltas. `total` is the sum of all adapters' weights, also of those that leave this place alone."""
    w_T11 = torch.tensor(weights, dtype=torch.float32)[:, None, None]
    if step == "elect":
        return lambda X_TMN: elect(X_TMN, w_T11, str(settings["vote"]), str(settings["divide"]))
    if step == "mean":
        w_T11 = w_T11 / divisor(total)
    return lambda X_TMN: (X_TMN * w_T11).sum(0)


def divisor(total: float) -> float:
    """The sum of the weights as something to divide by. Raises Mismatch when it is nothing."""
    if abs(total) < SMALLEST_SUM:
        message = f"The weights add up to {total:g}; a mean over them does not exist."
        raise Mismatch("zero_weight_sum", message, subject="weights", next_step="Change a weight, or take the sum.")
    return total


def elect(X_TMN: torch.Tensor, w_T11: torch.Tensor, vote: str = "plain", divide: str = "count") -> torch.Tensor:
    """Each entry takes the sign of the sum of its deltas, and those that have it: Σ_kept w_i X_i / D.

    TIES, arXiv 2306.01708, where votes are plain, D counts the kept ones and w = 1. `weighted` votes with w_i X_i,
    `count` with the signs; D may be the kept ones' weights, or 1 (`none`). An even vote is for plus; a zero has no say.
    """
    votes = {"plain": X_TMN, "weighted": X_TMN * w_T11, "count": X_TMN.sign()}[vote].sum(0)
    plus_MN = votes >= 0
    kept = torch.where(plus_MN, X_TMN > 0, X_TMN < 0)
    total = torch.where(kept, X_TMN * w_T11, 0.0).sum(0)
    if divide == "none":
        return total
    D = (kept * w_T11).sum(0) if divide == "weights" else kept.sum(0)
    return total / torch.where(D == 0, 1.0, D.to(total.dtype))


def sce_weights(squares: Sequence[float]) -> list[float]:
    """Each delta's share of the energy that the mask left: the weights of SCE (arXiv 2408.07990), which adds to 1."""
    total = sum(squares)
    return [square / total if total else 0.0 for square in squares]


def sce(X_TMN: torch.Tensor, w_T11: torch.Tensor) -> torch.Tensor:
    """`elect` by a plain vote with SCE's weights, divided by the kept ones' weights where they are not nothing."""
    plus_MN = X_TMN.sum(0) >= 0
    kept = torch.where(plus_MN, X_TMN > 0, X_TMN < 0)
    D = (kept * w_T11).sum(0)
    return torch.where(kept, X_TMN * w_T11, 0.0).sum(0) / D.clamp(min=1e-6)
