"""What is done to the factors of all adapters of a place first: calibration.

A pair is (B, A): O x r with the scale folded in, r x I. T adapters touch the place, R is the sum of their ranks.
"""

from collections.abc import Sequence
from math import inf

import torch

from composer.lowrank import NOISE
from composer.methods.basis import Pair


def pico(pairs: Sequence[Pair]) -> list[Pair]:
    """Output directions that many adapters share are damped: B_i <- U diag(a) U^T B_i (Pico, arXiv 2604.16826).

    [B_1 … B_T] = U diag(s) V^T, c_j = s_j^2 / Σ s^2, a_j = 1 / (1 + (T - 1) c_j). Scales are folded in first, unlike
    the authors' code, where adapters of unequal alpha would be weighed by their alpha. A is not touched.
    """
    if len(pairs) < 2:
        return list(pairs)
    U, sigma, _ = torch.linalg.svd(torch.cat([B for B, _ in pairs], dim=1), full_matrices=False)
    energy = sigma.square()
    a = 1 / (1 + (len(pairs) - 1) * energy / energy.sum().clamp(min=torch.finfo(torch.float32).tiny))
    return [(U @ (a[:, None] * (U.T @ B)), A) for B, A in pairs]


def norm_of(pair: Pair) -> float:
    """|B A|_F from Gram matrices in float64."""
    B, A = pair[0].double(), pair[1].double()
    return float(((B.T @ B) * (A @ A.T)).sum().clamp(min=0).sqrt())


def restoring_factor(now: float, wanted: float) -> float:
    """What brings a norm to the wanted one. 0 where inputs have cancelled: what is left is float32 noise, whose
    direction is chance."""
    return wanted / now if now > NOISE * wanted else 0.0


def restored(pairs: Sequence[Pair], norms: Sequence[float]) -> list[Pair]:
    """Each pair back to a norm."""
    return [(B * restoring_factor(norm_of((B, A)), norm), A) for (B, A), norm in zip(pairs, norms, strict=True)]


def cancellation(pairs: Sequence[Pair], weights: Sequence[float], norm: float) -> float:
    """How many times smaller than `norm` the weighted sum of the pairs is; infinite where nothing but noise is left."""
    B = torch.cat([B * weight for (B, _), weight in zip(pairs, weights, strict=True)], dim=1)
    now = norm_of((B, torch.cat([A for _, A in pairs])))
    return restoring_factor(now, norm) or (inf if norm else 0.0)
