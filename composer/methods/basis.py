"""Small shared bases: T low-rank deltas of one slot as small matrices X_i with Δ_i = P X_i Q^T, never dense.

Shapes: O outputs, I inputs, r_i the ranks, R their sum, p and q columns of P and Q. From QR of the stacked factors,
B = Q_B R_B and A^T = Q_A R_A, the core of delta i is C_i = R_B[:, i] R_A[:, i]^T and Δ_i = Q_B C_i Q_A^T. A pair is
(B, A), with the scale folded into B.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf

import torch

from composer.deltas.delta import Additive, LowRank
from composer.deltas.lowrank import NOISE, numerical_rank
from composer.errors import NotSupported
from composer.formats.recipes.methods import Compressed, Ctm, Gauged, Knots

_MOST_SWEEPS = 1000
_STEADY = 1e-10
_LEFT = 1e-6  # of the largest entry: rounding is 6e-8, and close singular values mix it

Pair = tuple[torch.Tensor, torch.Tensor]
"""(B, A): O x r with the scale folded in, r x I."""


@dataclass(frozen=True, slots=True)
class Basis:
    """P is O x p, Q is I x q, both with orthonormal columns, and each X_i is p x q. None stands for the identity.

    If this basis is too small for all deltas, `exact` has each delta in one that loses nothing:
    |Δ_i - P X_i Q^T|^2 = |exact_i|^2 - |X_i|^2, and likewise for sums.
    """

    P: torch.Tensor | None
    Q: torch.Tensor | None
    X: list[torch.Tensor]
    exact: list[torch.Tensor] | None = None

    def lift(self, X: torch.Tensor) -> Pair:
        """(B, A) with B A = P X Q^T; the rank is the smaller side of X."""
        if self.Q is None:
            return (self.P, X) if self.P is not None else (X, torch.eye(X.shape[1], device=X.device))
        return (X if self.P is None else self.P @ X), self.Q.T

    def for_entries(self) -> "Basis":
        """The basis in float32 for elementwise steps. Rounding residue of a delta's own zeros becomes zero; otherwise
        chance would decide whether it agrees, for example in the directions of a protected delta."""
        X = [torch.where(core.abs() > _LEFT * core.abs().max(), core, 0.0).float() for core in self.X]
        if not all(core.isfinite().all() for core in X):
            raise torch.linalg.LinAlgError("an entry is too large")  # pyright: ignore[reportPrivateImportUsage]
        P, Q = (None if matrix is None else matrix.float() for matrix in (self.P, self.Q))
        return replace(self, P=P, Q=Q, X=X)


def factored(delta: Additive) -> LowRank:
    """The delta if it has factors. Raises NotSupported otherwise."""
    if isinstance(delta, LowRank):
        return delta
    raise no_factors(delta.module)


def no_factors(module: str) -> NotSupported:
    """The error for a delta that a method in a basis cannot use."""
    message = f"The delta of {module} has no factors, which this method needs."
    next_step = "Use stack, linear or ties, without a rank and without protect."
    return NotSupported("no_factors", message, subject=module, next_step=next_step)


def pair_of(delta: LowRank) -> Pair:
    """The factors B (O x R, scaled) and A (R x I) in float32."""
    return delta.B_OR.float() * delta.scale, delta.A_RI.float()


def canonical(pair: Pair, in_output: float = 0.5) -> Pair:
    """The factors U Σ^p, Σ^(1-p) V^T of the same product, p = `in_output`. They do not depend on how an adapter splits
    it."""
    Q_B, R_B = torch.linalg.qr(pair[0])
    Q_A, R_A = torch.linalg.qr(pair[1].T)
    U, sigma, Vh = torch.linalg.svd(R_B @ R_A.T)
    rank = len(sigma)
    return Q_B @ (U[:, :rank] * sigma**in_output), (sigma[:, None] ** (1 - in_output) * Vh[:rank]) @ Q_A.T


@dataclass(frozen=True, slots=True)
class Cores:
    """Q_B (O x b), Q_A (I x a), their R factors by delta, and the cores C_i (b x a)."""

    Q_B: torch.Tensor
    Q_A: torch.Tensor
    R_B: list[torch.Tensor]
    R_A: list[torch.Tensor]

    @property
    def each(self) -> list[torch.Tensor]:
        """The core B A of each delta in the joint basis."""
        return [left @ other.T for left, other in zip(self.R_B, self.R_A, strict=True)]


def cores(pairs: Sequence[Pair]) -> Cores:
    """QR of the stacked factors: 2 (O + I) R^2 flops. Everything after it has size R."""
    ranks = [B.shape[1] for B, _ in pairs]
    Q_B, R_B = torch.linalg.qr(torch.cat([B for B, _ in pairs], dim=1))
    Q_A, R_A = torch.linalg.qr(torch.cat([A for _, A in pairs]).T)
    return Cores(Q_B, Q_A, list(R_B.split(ranks, dim=1)), list(R_A.split(ranks, dim=1)))


def basis_of(settings: Compressed, pairs: Sequence[Pair]) -> Basis:
    """The basis of the method's space; the core for a sum, which is the same in every basis."""
    match settings:
        case Knots():
            return knots(pairs, settings.side)
        case Ctm():
            rank = settings.ctm_rank or settings.rank or max(B.shape[1] for B, _ in pairs)
            return ctm(pairs, rank, settings.beta)
        case Gauged(gauge="canonical"):
            return core([canonical(pair) for pair in pairs])
        case _:
            return core(pairs)


def core(pairs: Sequence[Pair]) -> Basis:
    """P is the left singular vectors of the stacked B, Q the right ones of the stacked A (arXiv 2509.17786).

    Any basis would do for sums; this one matters for elementwise steps.
    """
    core_factors = cores(pairs)
    U = torch.linalg.svd(torch.cat(core_factors.R_B, dim=1))[0]
    V = torch.linalg.svd(torch.cat(core_factors.R_A, dim=1))[0]
    return Basis(core_factors.Q_B @ U, core_factors.Q_A @ V, [U.T @ C @ V for C in core_factors.each])


def knots(pairs: Sequence[Pair], side: str = "output") -> Basis:
    """[Δ_1 … Δ_T] = P S [V_1^T … V_T^T], X_i = S V_i^T (arXiv 2410.19735), from the SVD of [C_1 … C_T].

    `input` uses the transposed deltas. Directions below float32 noise are left out.
    """
    if side == "input":
        turned = knots([(A.T, B.T) for B, A in pairs])
        return Basis(None, turned.P, [X.T for X in turned.X])
    core_factors = cores(pairs)
    U, sigma, _ = torch.linalg.svd(torch.cat(core_factors.each, dim=1), full_matrices=False)
    U = U[:, : max(1, numerical_rank(sigma))]  # one is left even if all deltas are zero
    return Basis(core_factors.Q_B @ U, None, [(U.T @ C) @ core_factors.Q_A.T for C in core_factors.each])


def ctm(pairs: Sequence[Pair], rank: int, beta: float = 0.0) -> Basis:
    """The bases of rank `rank` that hold most of all deltas, equally weighted: max Σ |U^T Δ̃_i V|^2 (arXiv 2606.03723).

    Δ̃_i = Δ_i / |Δ_i| (β |Δ_i| + (1 - β) mean |Δ|). Tucker-2 by alternation from the HOSVD, in the core, until the fit
    changes by less than 1e-10 of the energy. X_i = U^T Δ_i V uses the original deltas; what the bases miss is lost.
    """
    core_factors = cores(pairs)
    C_Tba = torch.stack(core_factors.each).double()
    norms = C_Tba.flatten(1).norm(dim=1)
    wanted = beta * norms + (1 - beta) * norms.mean()
    M_Tba = C_Tba * torch.where(norms > 0, wanted / norms, 0.0)[:, None, None]
    energy = M_Tba.square().sum()
    V = _leading(M_Tba.transpose(1, 2), rank)
    U, fit = _leading(M_Tba, rank), torch.zeros((), dtype=torch.float64)
    for _ in range(_MOST_SWEEPS):
        U = _leading(M_Tba @ V, rank)
        V = _leading(M_Tba.transpose(1, 2) @ U, rank)
        now = (U.T @ M_Tba @ V).square().sum()
        if now - fit <= _STEADY * energy:
            break
        fit = now
    X = [(U.T @ C @ V).to(core_factors.Q_B) for C in C_Tba]
    return Basis(core_factors.Q_B @ U.to(core_factors.Q_B), core_factors.Q_A @ V.to(core_factors.Q_A), X, list(C_Tba))


def _leading(M_Tbn: torch.Tensor, rank: int) -> torch.Tensor:
    """The leading left singular vectors of [M_1 … M_T]."""
    return torch.linalg.svd(torch.cat(list(M_Tbn), dim=1), full_matrices=False)[0][:, :rank]


def pico(pairs: Sequence[Pair]) -> list[Pair]:
    """Damps output directions that many adapters share: B_i <- U diag(a) U^T B_i (Pico, arXiv 2604.16826).

    [B_1 … B_T] = U diag(s) V^T, c_j = s_j^2 / Σ s^2, a_j = 1 / (1 + (T - 1) c_j). Scales are folded in first; in the
    authors' code they are not, so adapters would count by their alpha. A is unchanged.
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
    """The factor from norm `now` to norm `wanted`. 0 if the inputs have cancelled, since the rest is float32 noise with
    a random direction."""
    return wanted / now if now > NOISE * wanted else 0.0


def restored(pairs: Sequence[Pair], norms: Sequence[float]) -> list[Pair]:
    """Each pair, scaled back to its norm."""
    return [(B * restoring_factor(norm_of((B, A)), norm), A) for (B, A), norm in zip(pairs, norms, strict=True)]


def cancellation(pairs: Sequence[Pair], weights: Sequence[float], norm: float) -> float:
    """The factor by which the weighted sum of the pairs is smaller than `norm`; infinite if only noise is left."""
    B = torch.cat([B * weight for (B, _), weight in zip(pairs, weights, strict=True)], dim=1)
    now = norm_of((B, torch.cat([A for _, A in pairs])))
    return restoring_factor(now, norm) or (inf if norm else 0.0)
