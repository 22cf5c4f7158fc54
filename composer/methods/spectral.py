"""Joins by singular vectors, and compression to a rank with its error. Shapes: p x q small, M x N dense."""

from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from composer.deltas.lowrank import numerical_rank
from composer.deltas.tensors import CPU, workers_on
from composer.errors import NotSupported
from composer.methods.basis import Basis, Pair
from composer.methods.matrix import Matrix, square_sum

_OVERSAMPLED = 16
_FIRST_RANGE = 64  # directions
_PASSES = 3
_ROWS = 256
_SMALL = 512  # up to this size an exact SVD costs less than a second

Triples = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""U, sigma and V^T of a matrix, in the order in which truncation keeps them."""


@dataclass(frozen=True, slots=True)
class Compression:
    """The loss in a module: |Δ - Δ'|_F is `error`, |Δ|_F is `norm`, and `rank` of `full_rank` directions were kept."""

    module: str
    rank: int
    full_rank: int
    norm: float
    error: float

    def times(self, factor: float) -> "Compression":
        return replace(self, norm=self.norm * abs(factor), error=self.error * abs(factor))

    def at(self, norm: float) -> "Compression":
        """The compression after Δ and Δ' are each scaled to that norm.

        A share e² of |Δ|² was lost, and the lost part is orthogonal to the rest. So the angle between Δ and Δ' has
        cosine c = √(1 - e²), and |Δ - Δ'| = |Δ| √(2 (1 - c)) = |Δ| e √(2 / (1 + c)).
        """
        cosine = max(0.0, 1 - self.relative**2) ** 0.5
        return replace(self, norm=norm, error=norm * self.relative * (2 / (1 + cosine)) ** 0.5)

    @property
    def relative(self) -> float:
        """The error over the norm; 0 for a zero delta."""
        return self.error / self.norm if self.norm else 0.0


def total_loss(compressions: Iterable[Compression]) -> float:
    """|Δ - Δ'| / |Δ| over all the modules; 0 if there are none."""
    parts = list(compressions)
    norm = sum(part.norm**2 for part in parts)
    return (sum(part.error**2 for part in parts) / norm) ** 0.5 if norm else 0.0


@contextmanager
def decomposing(module: str) -> Generator[None]:
    """Raises NotSupported, naming the module, if a decomposition inside does not converge."""
    try:
        yield
    except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
        message = f"The factors at {module} cannot be decomposed: their product exceeds float32 ({error})."
        next_step = "Check this adapter's norms (inspect); leave it out, or use a plain sum (stack)."
        raise NotSupported("not_decomposable", message, subject=module, next_step=next_step) from error


def tsv(X: Sequence[torch.Tensor], weights: Sequence[float], smaller_side: int) -> torch.Tensor:
    """TSV-M (arXiv 2412.00081): concatenates all singular vectors and replaces each side by its nearest orthonormal
    set.

    Takes the first t_i triples of each X_i = U_i Σ_i V_i^T, where t_i is its numerical rank or `smaller_side` of the
    weight / T, whichever is less. The result is Û⊥ diag(w_i Σ_i) V̂⊥^T. Zero singular values contribute no vectors,
    since theirs are arbitrary.
    """
    most = max(1, smaller_side // len(X))
    U, sigma, V = [], [], []
    for X_i, weight in zip(X, weights, strict=True):
        U_i, sigma_i, Vh_i = torch.linalg.svd(X_i, full_matrices=False)
        t = min(most, numerical_rank(sigma_i))
        U.append(U_i[:, :t])
        sigma.append(weight * sigma_i[:t])
        V.append(Vh_i[:t].T)
    return _polar(torch.cat(U, 1)) @ (torch.cat(sigma)[:, None] * _polar(torch.cat(V, 1)).T)


def _polar(U_pn: torch.Tensor) -> torch.Tensor:
    """The nearest matrix with orthonormal columns (rows, if there are more columns than rows)."""
    left, sigma, right = torch.linalg.svd(U_pn, full_matrices=False)
    n = numerical_rank(sigma)  # shared vectors (one adapter twice, a frozen A) leave others arbitrary
    return left[:, :n] @ right[:n]


def triples(X: torch.Tensor) -> Triples:
    """The thin SVD U, sigma, Vh."""
    return torch.linalg.svd(X, full_matrices=False)


def iso(X: torch.Tensor) -> Triples:
    """Iso-C (arXiv 2502.04959): replaces all singular values by their mean, over the numerical rank.

    With n = min(M, N), as for dense task vectors, an arbitrary rotation would fill the null space. The triples keep
    their original order, so that truncation keeps the strongest directions of the sum.
    """
    U, sigma, Vh = triples(X)
    n = max(1, numerical_rank(sigma))
    return U[:, :n], sigma[:n].mean().expand(n), Vh[:n]


def product(parts: Triples) -> torch.Tensor:
    """U diag(sigma) Vh."""
    U, sigma, Vh = parts
    return (U * sigma) @ Vh


def kept_rank(sigma: torch.Tensor, norm: float, rank: int | None, energy: float | None) -> int:
    """The number of directions to keep: at most `rank`, no more than hold the share `energy` of |Δ|^2, at least one."""
    count = len(sigma) if rank is None else min(rank, len(sigma))
    if energy is not None:
        share = sigma.double().square().cumsum(0) / max(norm**2, torch.finfo(torch.float64).tiny)
        # 1e-12, so that another order of summation does not add a direction.
        count = min(count, int(torch.searchsorted(share, energy * (1 - 1e-12))) + 1)
    return max(1, min(count, numerical_rank(sigma)))


def compress(
    module: str, basis: Basis, parts: Triples, rank: int | None, energy: float | None
) -> tuple[Pair, Compression]:
    """Truncates P X Q^T to the first directions of X, with the roots of sigma on either side. The error is exact."""
    U, sigma, Vh = parts
    norm = float(sigma.double().norm())
    count = kept_rank(sigma, norm, rank, energy)
    root = sigma[:count].sqrt()
    left, right = U[:, :count] * root, root[:, None] * Vh[:count]
    pair = (left if basis.P is None else basis.P @ left, right if basis.Q is None else right @ basis.Q.T)
    return pair, Compression(module, count, len(sigma), norm, float(sigma[count:].double().norm()))


def _leading(X: torch.Tensor, size: int, pool: ThreadPoolExecutor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U, sigma and V^T of about `size` leading directions."""

    def product(X: torch.Tensor, Y: torch.Tensor) -> torch.Tensor:
        """X Y in fixed parts, so that the last bits do not depend on the number of threads."""
        return torch.cat(list(pool.map(lambda rows: rows @ Y, X.split(_ROWS))))

    # Drawn on the CPU, so that the numbers are the same on every device.
    Y = product(X, torch.randn(X.shape[1], size, generator=torch.Generator().manual_seed(0)).to(X.device))
    for _ in range(_PASSES):
        Y = product(X, torch.linalg.qr(product(X.T, torch.linalg.qr(Y)[0]))[0])
    Q = torch.linalg.qr(Y)[0]
    U, sigma, Vh = torch.linalg.svd(product(X.T, Q).T, full_matrices=False)
    return Q @ U, sigma, Vh


def _triples_for(
    X: torch.Tensor, norm: float, rank: int | None, energy: float | None, pool: ThreadPoolExecutor
) -> Triples:
    """At least the leading triples that `kept_rank` keeps."""
    size = (_FIRST_RANGE if energy is not None and rank is None else rank or min(X.shape)) + _OVERSAMPLED
    while max(2 * size, _SMALL) < min(X.shape):
        leading = _leading(X, size, pool)
        if rank is not None or float(leading[1].double().norm()) ** 2 >= (energy or 1.0) * norm**2:
            return leading
        size *= 2
    return torch.linalg.svd(X, full_matrices=False)


def compress_dense(
    module: str, matrix: Matrix, rank: int | None, energy: float | None, device: torch.device = CPU
) -> tuple[Pair, Compression]:
    """Compresses a dense delta to rank r by a randomized range with power passes (arXiv 0909.4061). Measures the error.

    Uses all cores and keeps the dense matrix in memory. Without a rank, the range doubles until it holds the energy. If
    the matrix is small, or the range is not a small part of it, the SVD is exact and takes three times as much.
    """
    with ThreadPoolExecutor(workers_on(device), "dense") as pool:
        X = matrix.dense(pool)
        norm = square_sum(Matrix.of(X)) ** 0.5
        U, sigma, Vh = _triples_for(X, norm, rank, energy, pool)
    count = kept_rank(sigma, norm, rank, energy)
    root = sigma[:count].sqrt()
    left, right = U[:, :count] * root, root[:, None] * Vh[:count]
    # Measured by entry: for a small loss, |X|^2 - |X'|^2 vanishes in float32.
    missed = square_sum(Matrix((len(X), X.shape[1]), lambda first, last: X[first:last] - left[first:last] @ right))
    return (left, right), Compression(module, count, min(X.shape), norm, missed**0.5)
