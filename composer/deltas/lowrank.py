"""Inner products, angles and overlaps of low-rank deltas, from their factors alone.

Delta_i = s_i B_i A_i in the module's own orientation, whatever the storage: the columns of B span its outputs, the rows
of A its inputs. Shapes: T deltas, O outputs, I inputs, R sum of the ranks, r one rank, K a numerical rank. Everything
follows from the R x R Gram matrices of the stacked factors; the O x I product is never built. The sum over the entries
of each block of an R x R matrix M is Z^T M Z, where Z_RT marks the delta that a direction belongs to.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np
import torch

from composer.deltas.delta import LowRank
from composer.formats.checkpoints.numeric import Float64, Summed

NOISE = 1e-5
"""A direction below this share of the largest singular value is float32 noise in the factors, not part of the span."""

Singular = tuple[torch.Tensor, torch.Tensor]
"""sigma_K, and M_rK for which the near factor times M has orthonormal columns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairSums(Summed):
    """Sums that relate T deltas, T x T float64. The sums add up over modules; quotients are taken last.

    inner: <Delta_i, Delta_j>; weighted: the same for w_i Delta_i; carried: <w_i Delta_i, Delta_j>. outputs: energy of
    Delta_i inside the output span of Delta_j, |P_j Delta_i|_F^2; inputs: the same for input spans. *_chance: what
    random spans of the same dimensions would catch, |Delta_i|^2 K_j / O (or / I).
    """

    inner: Float64
    weighted: Float64
    carried: Float64
    outputs: Float64
    inputs: Float64
    outputs_chance: Float64
    inputs_chance: Float64

    @classmethod
    def zero(cls, count: int) -> "PairSums":
        return cls(**{field.name: np.zeros((count, count)) for field in fields(cls)})

    def norm(self, i: int) -> float:
        """|Delta_i|_F."""
        return max(0.0, float(self.inner[i, i])) ** 0.5

    def cosine(self, i: int, j: int) -> float:
        """<Delta_i, Delta_j> / (|Delta_i| |Delta_j|); 0 when either is zero."""
        return _quotient(self.inner[i, j], self.norm(i) * self.norm(j))

    def output_overlap(self, i: int, j: int) -> float:
        """The share of Delta_i's energy inside the output span of Delta_j; by chance, rank / outputs."""
        return _quotient(self.outputs[i, j], self.inner[i, i])

    def input_overlap(self, i: int, j: int) -> float:
        """The share of Delta_i's energy inside the input span of Delta_j; by chance, rank / inputs."""
        return _quotient(self.inputs[i, j], self.inner[i, i])

    def output_excess(self, i: int, j: int) -> float:
        """`output_overlap` with chance removed: (o - K/O) / (1 - K/O), 0 at chance, 1 for full overlap."""
        return _excess(self.outputs[i, j], self.outputs_chance[i, j], self.inner[i, i])

    def input_excess(self, i: int, j: int) -> float:
        """`input_overlap` with chance removed: (o - K/I) / (1 - K/I), 0 at chance, 1 for full overlap."""
        return _excess(self.inputs[i, j], self.inputs_chance[i, j], self.inner[i, i])

    def retention(self, i: int) -> float:
        """<M, Delta_i> / |Delta_i|^2 for the weighted sum M: its own weight if the others are orthogonal to it."""
        return _quotient(self.carried[:, i].sum(), self.inner[i, i])

    def interference(self) -> float:
        """|sum w_i Delta_i|^2 / sum |w_i Delta_i|^2: 1 orthogonal, below 1 they cancel, above 1 they add up."""
        return _quotient(self.weighted.sum(), self.weighted.trace())

    def shares(self) -> list[float]:
        """w_i^2 |Delta_i|^2 / sum over all: each delta's share of the energy; all 0 if there is none."""
        return [_quotient(energy, self.weighted.trace()) for energy in self.weighted.diagonal()]

    def pick(self, *indices: int) -> "PairSums":
        """The sums for some of the deltas, in the order given."""
        square = np.ix_(indices, indices)
        return PairSums(**{field.name: getattr(self, field.name)[square] for field in fields(self)})


@dataclass(frozen=True)
class Grams:
    """The Gram matrices of T concatenated deltas of one module, R x R float64: s_i s_j B_i^T B_j and A_i A_j^T."""

    outputs: torch.Tensor
    inputs: torch.Tensor
    ranks: tuple[int, ...]
    shape: tuple[int, int]  # O, I

    @classmethod
    def of(cls, deltas: Sequence[LowRank]) -> "Grams":
        """The Gram matrices, at 2 (O + I) R^2 flops in float64. Products of float32 factors are exact there, so
        squaring the condition number is harmless. With float32 products, singular values below 3e-4 of the largest are
        noise.
        """
        B_OR = torch.cat([delta.B_OR for delta in deltas], dim=1).double()
        A_RI = torch.cat([delta.A_RI for delta in deltas]).double()
        ranks = tuple(delta.rank for delta in deltas)
        s_R = torch.tensor([delta.scale for delta in deltas], dtype=torch.float64).repeat_interleave(
            torch.tensor(ranks)
        )
        return cls(s_R[:, None] * (B_OR.T @ B_OR) * s_R, A_RI @ A_RI.T, ranks, (B_OR.shape[0], A_RI.shape[1]))

    def inner(self) -> Float64:
        """<Delta_i, Delta_j>_F = sum over the entries of (B_i^T B_j) * (A_i A_j^T), scales folded in."""
        return self.blocks(self.outputs * self.inputs)

    def blocks(self, M_RR: torch.Tensor) -> Float64:
        """T x T: the sum over the entries of each block."""
        return (self.membership.T @ M_RR @ self.membership).numpy()

    @cached_property
    def membership(self) -> torch.Tensor:
        """Z_RT."""
        return torch.eye(len(self.ranks), dtype=torch.float64).repeat_interleave(torch.tensor(self.ranks), dim=0)

    @cached_property
    def output_spectra(self) -> list[Singular]:
        return self._spectra(self.outputs, self.inputs)

    @cached_property
    def input_spectra(self) -> list[Singular]:
        return self._spectra(self.inputs, self.outputs)

    def _spectra(self, near: torch.Tensor, far: torch.Tensor) -> list[Singular]:
        ends = list(accumulate(self.ranks, initial=0))
        parts = [slice(begin, end) for begin, end in pairwise(ends)]
        return [singular(near[part, part], far[part, part]) for part in parts]

    def diagonal_blocks(self, M_RR: torch.Tensor) -> torch.Tensor:
        """The matrix with everything outside the diagonal blocks set to zero."""
        return M_RR * (self.membership @ self.membership.T)

    def energy_inside(self, near: torch.Tensor, far: torch.Tensor, spectra: Sequence[Singular]) -> Float64:
        """Entry i, j: |U_j^T Delta_i|_F^2, the trace of S_i F_i S_i^T with S = U_j^T N = M_j^T N_j^T N, near side."""
        rows = near.split(list(self.ranks))
        columns: list[torch.Tensor] = []
        own = self.diagonal_blocks(far)
        for (_, M_rK), N_rR in zip(spectra, rows, strict=True):
            S_KR = M_rK.T @ N_rR
            columns.append(((S_KR @ own) * S_KR).sum(0) @ self.membership)
        return torch.stack(columns, dim=1).numpy()


def numerical_rank(sigma: torch.Tensor) -> int:
    """The number of singular values (descending) above float32 noise."""
    return int((sigma > NOISE * sigma[0]).sum()) if len(sigma) else 0


def singular(near: torch.Tensor, far: torch.Tensor) -> Singular:
    """The singular values of a delta (descending, without noise) from its r x r Gram matrices, and M_rK of its near
    side.

    With near factor N and F^(1/2) the root of the far Gram matrix, N F^(1/2) = U sigma V^T has the delta's own U
    and sigma, and its Gram matrix is V sigma^2 V^T. So U = N M with M = F^(1/2) V / sigma, in any gauge.
    """
    values, vectors = torch.linalg.eigh(far)
    half = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    values, vectors = torch.linalg.eigh(half @ near @ half)
    sigma = values.flip(0).clamp(min=0).sqrt()
    K = numerical_rank(sigma)
    return sigma[:K], half @ vectors.flip(1)[:, :K] / sigma[:K]


def relations(deltas: Sequence[LowRank | None], weights: Sequence[float] | None = None) -> PairSums:
    """The sums of T deltas of one module, None for adapters that do not change it. Ranks may differ. Weights default
    to 1."""
    given = [1.0] * len(deltas) if weights is None else weights
    present = [index for index, delta in enumerate(deltas) if delta is not None]
    sums = PairSums.zero(len(deltas))
    if not present:
        return sums
    grams = Grams.of([delta for delta in deltas if delta is not None])
    block = np.ix_(present, present)
    for name, value in _angles(grams, [given[index] for index in present]).items():
        getattr(sums, name)[block] = value
    return sums


def _angles(grams: Grams, weights: Sequence[float]) -> dict[str, Float64]:
    inner, w = grams.inner(), np.array(weights)
    norms = inner.diagonal()[:, None]
    K = np.array([[len(sigma) for sigma, _ in grams.output_spectra]])
    outputs, inputs = grams.outputs, grams.inputs
    return {
        "inner": inner,
        "weighted": inner * w * w[:, None],
        "carried": inner * w[:, None],
        "outputs": grams.energy_inside(outputs, inputs, grams.output_spectra),
        "inputs": grams.energy_inside(inputs, outputs, grams.input_spectra),
        "outputs_chance": norms * K / grams.shape[0],
        "inputs_chance": norms * K / grams.shape[1],
    }


def _quotient(part: float, total: float) -> float:
    return float(part / total) if total > 0 else 0.0


def _excess(caught: float, chance: float, energy: float) -> float:
    # Two full-rank deltas necessarily overlap: chance explains everything, and there is no excess.
    room = energy - chance
    return float((caught - chance) / room) if room > 1e-9 * energy else 0.0
