"""Chooses which entries of a delta are kept. Each step decides once per delta, then answers for any rows.

p is the density (the share kept), n the number of entries. Shapes: M rows, N columns.
"""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch

from composer.formats.recipes.methods import Breadcrumbs, Dare, Della, Magnitude, MethodSettings, Sce
from composer.methods.matrix import BLOCK_ROWS, Matrix, count_nonzero, largest, magnitude_bits, sorted_rows

Keep = Callable[[torch.Tensor, int], torch.Tensor]
"""(X_MN, first row) -> X_MN with dropped entries set to zero; pure."""

_DRAWS = 1 << 16


def keeps(settings: MethodSettings, matrices: Sequence[Matrix], keys: Sequence[str]) -> list[Keep]:
    """One Keep for each of the T deltas of a slot. `keys` identify them for the random steps: adapter, tensor, slot."""
    match settings:
        case Magnitude():
            return [largest([matrix], kept_entries(matrix, settings.density))[0].kept for matrix in matrices]
        case Dare():
            return [dare(settings.density, settings.seed, key) for key in keys]
        case Della():
            return [della(settings.density, settings.epsilon, settings.seed, key) for key in keys]
        case Breadcrumbs():
            return [breadcrumbs(matrix, settings.density, settings.gamma) for matrix in matrices]
        case Sce():
            return [by_variance(matrices, settings.density)] * len(matrices)
        case _:
            return [lambda X_MN, _begin: X_MN] * len(matrices)


def dare(density: float, seed: int, key: str) -> Keep:
    """Keeps each entry with probability p and divides it by p, which preserves the expectation (arXiv 2311.03099).

    The mask depends only on seed, key and position: not on the order of adapters, nor on rows, threads or device.
    """
    limit = max(1, round(density * _DRAWS))

    def keep(X_MN: torch.Tensor, begin: int) -> torch.Tensor:
        return torch.where(_draws(X_MN, begin, seed, key) < limit, X_MN * (_DRAWS / limit), 0.0)

    return keep


def della(density: float, epsilon: float, seed: int, key: str) -> Keep:
    """Keeps larger entries of a row with higher probability, (p - ε) + 2ε rank / (N - 1), and divides by it.

    This is MagPrune (arXiv 2406.11617); rank 0 is the smallest magnitude.
    """

    def keep(X_MN: torch.Tensor, begin: int) -> torch.Tensor:
        rank = _ranks(X_MN)
        q_MN = (density - epsilon) + 2 * epsilon * rank.float() / max(1, X_MN.shape[1] - 1)
        return torch.where(_draws(X_MN, begin, seed, key) < q_MN * _DRAWS, X_MN / q_MN, 0.0)

    return keep


def _ranks(X_MN: torch.Tensor) -> torch.Tensor:
    """The ranks of the magnitudes within their row, 0 for the smallest; ties in column order.

    Sorts magnitude and column as one number, which is twice as fast as a stable argsort.
    """
    columns = torch.arange(X_MN.shape[1], device=X_MN.device)
    keys = magnitude_bits(X_MN).long() << 32 | columns
    order = sorted_rows(keys) & 0xFFFF_FFFF
    return torch.empty_like(order).scatter_(1, order, columns.expand_as(order))


def breadcrumbs(matrix: Matrix, density: float, gamma: float) -> Keep:
    """Drops the int(gamma n) largest entries, then the smallest until int(p n) are left (arXiv 2312.06795)."""
    n = _entries(matrix)
    outliers = int(gamma * n)
    (kept,) = largest([matrix], min(n, outliers + kept_entries(matrix, density)))
    if not outliers:
        return kept.kept
    (dropped,) = largest([matrix], outliers)
    return lambda X_MN, begin: torch.where(kept.mask(X_MN, begin) & ~dropped.mask(X_MN, begin), X_MN, 0.0)


def by_variance(matrices: Sequence[Matrix], density: float) -> Keep:
    """Keeps, with one mask for all, the int(p * nonzero) entries that vary most between adapters (arXiv 2408.07990).

    A single adapter has no variance and keeps all entries.
    """
    if len(matrices) == 1:
        return lambda X_MN, _begin: X_MN

    def variance(first: int, last: int) -> torch.Tensor:
        # torch's `var` over a short first dimension takes fifteen times as long.
        X_TMN = torch.stack([matrix.rows(first, last) for matrix in matrices])
        return X_TMN.sub_(X_TMN.mean(0)).square_().mean(0)

    varying = Matrix(matrices[0].shape, variance)
    (kept,) = largest([varying], int(density * count_nonzero(varying)))

    def keep(X_MN: torch.Tensor, begin: int) -> torch.Tensor:
        return torch.where(kept.mask(varying.rows(begin, begin + X_MN.shape[0]), begin), X_MN, 0.0)

    return keep


def _draws(X_MN: torch.Tensor, begin: int, seed: int, key: str) -> torch.Tensor:
    """Uniform integers below 2^16, one per entry. Philox is counter-based, so a block does not need earlier blocks.
    Drawn on the CPU, so that they are the same on every device."""
    words = np.frombuffer(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:16], dtype="<u8")
    rows, columns = X_MN.shape
    first, quads = begin - begin % BLOCK_ROWS, -(-columns // 4)
    drawn: list[np.ndarray[tuple[int, int], np.dtype[np.uint16]]] = []
    for at in range(first, begin + rows, BLOCK_ROWS):
        counter = np.array([0, 0, 0, at // BLOCK_ROWS], dtype=np.uint64)
        raw = np.random.Philox(key=words, counter=counter).random_raw(BLOCK_ROWS * quads)
        drawn.append(raw.astype("<u8", copy=False).view("<u2").reshape(BLOCK_ROWS, 4 * quads))
    chosen = np.concatenate(drawn)[begin - first : begin - first + rows, :columns]
    return torch.from_numpy(chosen.astype(np.int32)).to(X_MN.device)


def kept_entries(matrix: Matrix, density: float) -> int:
    """The number of entries to keep, at least one: in a basis of few directions, the share may round to none."""
    return max(1, int(density * _entries(matrix)))


def _entries(matrix: Matrix) -> int:
    return matrix.shape[0] * matrix.shape[1]
