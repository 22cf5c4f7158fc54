"""Inner products, angles, overlaps and spectra of low-rank deltas, from their factors alone.

Delta_i = s_i B_i A_i in the module's own orientation, whatever the storage: the columns of B span its outputs, the rows
of A its inputs. Shapes: T deltas, O outputs, I inputs, R sum of the ranks, r one rank, K a numerical rank. All follows
from the R x R Gram matrices of the stacked factors; the O x I product is never built.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from composer.delta import LowRank

# A direction below this share of the largest singular value is float32 noise in the factors, not part of the span.
NOISE = 1e-5

Blocks = list[list[torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Sums:
    """What T deltas have in common, T x T float64. Sums add up over modules; quotients are taken last.

    inner: <Delta_i, Delta_j>. outputs: energy of Delta_i inside the output span of Delta_j, |P_j Delta_i|_F^2; inputs:
    the same for input spans. *_chance: what random spans of those dimensions would catch, |Delta_i|^2 K_j / O (or / I).
    """

    inner: torch.Tensor
    outputs: torch.Tensor
    inputs: torch.Tensor
    outputs_chance: torch.Tensor
    inputs_chance: torch.Tensor

    @classmethod
    def zero(cls, count: int) -> "Sums":
        return cls(*(torch.zeros(count, count, dtype=torch.float64) for _ in fields(cls)))

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def norm(self, i: int) -> float:
        """|Delta_i|_F."""
        return self.inner[i, i].clamp(min=0).sqrt().item()

    def cosine(self, i: int, j: int) -> float:
        """<Delta_i, Delta_j> / (|Delta_i| |Delta_j|); 0 when either is zero."""
        return _quotient(self.inner[i, j].item(), self.norm(i) * self.norm(j))

    def output_overlap(self, i: int, j: int) -> float:
        """The share of Delta_i's energy inside the output span of Delta_j. By chance it is rank / outputs."""
        return _quotient(self.outputs[i, j].item(), self.inner[i, i].item())

    def input_overlap(self, i: int, j: int) -> float:
        """The share of Delta_i's energy inside the input span of Delta_j. By chance it is rank / inputs."""
        return _quotient(self.inputs[i, j].item(), self.inner[i, i].item())

    def output_excess(self, i: int, j: int) -> float:
        """`output_overlap` with chance removed: (o - K/O) / (1 - K/O), 0 at chance, 1 for full overlap."""
        return _excess(self.outputs[i, j], self.outputs_chance[i, j], self.inner[i, i])

    def input_excess(self, i: int, j: int) -> float:
        """`input_overlap` with chance removed: (o - K/I) / (1 - K/I), 0 at chance, 1 for full overlap."""
        return _excess(self.inputs[i, j], self.inputs_chance[i, j], self.inner[i, i])

    def interference(self, weights: Sequence[float]) -> float:
        """|sum w_i Delta_i|^2 / sum |w_i Delta_i|^2: 1 orthogonal, below 1 they cancel, above 1 they add up."""
        w = torch.tensor(weights, dtype=torch.float64)
        return _quotient((w @ self.inner @ w).item(), (w * w * self.inner.diagonal()).sum().item())

    def shares(self, weights: Sequence[float]) -> list[float]:
        """w_i^2 |Delta_i|^2 / sum over all: how much of the energy each delta brings; all 0 when there is none."""
        energy = torch.tensor(weights, dtype=torch.float64) ** 2 * self.inner.diagonal()
        return [_quotient(one, energy.sum().item()) for one in energy.tolist()]

    def pick(self, *indices: int) -> "Sums":
        """The sums of some of the deltas, in the order given."""
        chosen = torch.tensor(indices)
        return Sums(*(getattr(self, field.name)[chosen][:, chosen] for field in fields(self)))


def compare(deltas: Sequence[LowRank | None]) -> Sums:
    """The sums of T deltas of one module; None where an adapter leaves it alone. Ranks may differ.

    2 (O + I) R^2 flops in float64: products of float32 factors lose nothing there, so squaring the condition number is
    harmless. With float32 products singular values below 3e-4 of the largest would be noise.
    """
    present = [index for index, delta in enumerate(deltas) if delta is not None]
    sums = Sums.zero(len(deltas))
    if not present:
        return sums
    outputs, inputs, (outputs_dim, inputs_dim) = _grams([delta for delta in deltas if delta is not None])
    place = torch.tensor(present)
    rows, columns = place[:, None], place[None, :]
    inner = _inner(outputs, inputs)
    norms = inner.diagonal()[:, None]
    K = torch.tensor([[len(_spectrum(outputs, inputs, j)[0]) for j in range(len(present))]], dtype=torch.float64)
    sums.inner[rows, columns] = inner
    sums.outputs[rows, columns] = _caught(outputs, inputs)
    sums.inputs[rows, columns] = _caught(inputs, outputs)
    sums.outputs_chance[rows, columns] = norms * K / outputs_dim
    sums.inputs_chance[rows, columns] = norms * K / inputs_dim
    return sums


def spectra(deltas: Sequence[LowRank]) -> list[torch.Tensor]:
    """The singular values of each delta, float64, descending, without those that are float32 noise."""
    outputs, inputs, _ = _grams(deltas)
    return [_spectrum(outputs, inputs, index)[0] for index in range(len(deltas))]


def _grams(deltas: Sequence[LowRank]) -> tuple[Blocks, Blocks, tuple[int, int]]:
    """Blocks s_i s_j B_i^T B_j and A_i A_j^T, and (O, I)."""
    B_OR = torch.cat([delta.B_OR.double() * delta.scale for delta in deltas], dim=1)
    A_RI = torch.cat([delta.A_RI.double() for delta in deltas])
    ranks = [delta.rank for delta in deltas]
    blocks = [
        [list(rows.split(ranks, dim=1)) for rows in gram.split(ranks, dim=0)] for gram in (B_OR.T @ B_OR, A_RI @ A_RI.T)
    ]
    return blocks[0], blocks[1], (B_OR.shape[0], A_RI.shape[1])


def _inner(outputs: Blocks, inputs: Blocks) -> torch.Tensor:
    """<Delta_i, Delta_j>_F = sum over the entries of (B_i^T B_j) * (A_i A_j^T), scales folded in."""
    T = len(outputs)
    return torch.stack([torch.stack([(outputs[i][j] * inputs[i][j]).sum() for j in range(T)]) for i in range(T)])


def _spectrum(near: Blocks, far: Blocks, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Singular values sigma_K of a delta and the matrix M_rK for which its near factor times M has orthonormal columns.

    With N the near factor and F^(1/2) the root of the far Gram matrix, N F^(1/2) = U sigma V^T has the delta's own U
    and sigma, and its Gram matrix is V sigma^2 V^T. So U = N M with M = F^(1/2) V / sigma, in any gauge.
    """
    values, vectors = torch.linalg.eigh(far[index][index])
    half = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    values, vectors = torch.linalg.eigh(half @ near[index][index] @ half)
    sigma = values.flip(0).clamp(min=0).sqrt()
    K = int((sigma > NOISE * sigma[0]).sum())
    return sigma[:K], half @ vectors.flip(1)[:, :K] / sigma[:K]


def _caught(near: Blocks, far: Blocks) -> torch.Tensor:
    """Entry i, j: |U_j^T Delta_i|_F^2 = trace of S F_i S^T with S = M_j^T N_j^T N_i, on the near side's spans."""
    T = len(near)
    energy = torch.zeros(T, T, dtype=torch.float64)
    for j in range(T):
        M_rK = _spectrum(near, far, j)[1]
        for i in range(T):
            S_Kr = M_rK.T @ near[j][i]
            energy[i, j] = ((S_Kr @ far[i][i]) * S_Kr).sum()
    return energy


def _quotient(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def _excess(caught: torch.Tensor, chance: torch.Tensor, energy: torch.Tensor) -> float:
    # Two full-rank deltas overlap by necessity: then chance is everything, and there is no excess.
    room = (energy - chance).item()
    return (caught - chance).item() / room if room > 1e-9 * energy.item() else 0.0
