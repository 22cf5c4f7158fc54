"""What is done to the factors of all adapters of a place first: calibration.

A pair is (B, A): O x r with the scale folded in, r x I. T adapters touch the place, R is the sum of their ranks.
"""

from collections.abc import Sequence

import torch

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


def restored(pairs: Sequence[Pair], norms: Sequence[float]) -> list[Pair]:
    """Each pair back to a norm."""
    return [
        (B * (norm / now if (now := norm_of((B, A))) else 0.0), A) for (B, A), norm in zip(pairs, norms, strict=True)
    ]
