"""Which entries of a delta are kept: each step decides once per delta, then answers for any rows.

p is the density (the share that is kept), n the number of entries. Shapes: M rows, N columns.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import numpy as np
import torch

from composer.methods.matrix import BLOCK_ROWS, Matrix, count_nonzero, largest, magnitude_bits

Keep = Callable[[torch.Tensor, int], torch.Tensor]
"""(X_MN, first row) -> X_MN with the entries that go set to zero; pure."""

_DRAWS = 1 << 16


def keeps(step: str, matrices: Sequence[Matrix], keys: Sequence[str], settings: Mapping[str, object]) -> list[Keep]:
    """What each of the T deltas of one place keeps. `keys` name them for the random steps: adapter, tensor, place."""
    if step == "magnitude":
        return [largest([matrix], kept_entries(matrix, _density(settings)))[0].kept for matrix in matrices]
    if step == "dare":
        return [dare(_density(settings), _seed(settings), key) for key in keys]
    if step == "della":
        return [della(_density(settings), cast(float, settings["epsilon"]), _seed(settings), key) for key in keys]
    if step == "breadcrumbs":
        return [breadcrumbs(matrix, _density(settings), cast(float, settings["gamma"])) for matrix in matrices]
    if step == "sce":
        return [by_variance(matrices, _density(settings))] * len(matrices)
    return [lambda X_MN, _begin: X_MN] * len(matrices)


def dare(density: float, seed: int, key: str) -> Keep:
    """Each entry is kept with probability p and divided by it, so that the expectation stays (arXiv 2311.03099).

    The mask depends on seed, key and place alone: neither on the order of adapters, nor on rows, threads or device.
    """
    limit = max(1, round(density * _DRAWS))

    def keep(X_MN: torch.Tensor, begin: int) -> torch.Tensor:
        return torch.where(_draws(X_MN, begin, seed, key) < limit, X_MN * (_DRAWS / limit), 0.0)

    return keep


def della(density: float, epsilon: float, seed: int, key: str) -> Keep:
    """The larger an entry within its row, the likelier it is kept: (p - ε) + 2ε rank / (N - 1), and divided by that.

    MagPrune of arXiv 2406.11617; ranks count magnitudes from the smallest, 0.
    """

    def keep(X_MN: torch.Tensor, begin: int) -> torch.Tensor:
        rank = _ranks(X_MN)
        q_MN = (density - epsilon) + 2 * epsilon * rank.float() / max(1, X_MN.shape[1] - 1)
        return torch.where(_draws(X_MN, begin, seed, key) < q_MN * _DRAWS, X_MN / q_MN, 0.0)

    return keep


def _ranks(X_MN: torch.Tensor) -> torch.Tensor:
    """Of the magnitudes in their row, from the smallest, 0; equal ones in the order of columns.

    Magnitude and column are sorted as one number: twice as fast as a stable argsort.
    """
    columns = torch.arange(X_MN.shape[1])
    keys = magnitude_bits(X_MN).long() << 32 | columns
    order = torch.from_numpy(np.sort(keys.numpy(), axis=1)) & 0xFFFF_FFFF
    return torch.empty_like(order).scatter_(1, order, columns.expand_as(order))


def breadcrumbs(matrix: Matrix, density: float, gamma: float) -> Keep:
    """Without the int(gamma n) largest, then without the smallest until int(p n) are left (arXiv 2312.06795)."""
    n = _entries(matrix)
    outliers = int(gamma * n)
    (kept,) = largest([matrix], min(n, outliers + kept_entries(matrix, density)))
    if not outliers:
        return kept.kept
    (dropped,) = largest([matrix], outliers)
    return lambda X_MN, begin: torch.where(kept.mask(X_MN, begin) & ~dropped.mask(X_MN, begin), X_MN, 0.0)


def by_variance(matrices: Sequence[Matrix], density: float) -> Keep:
    """One mask for all: the int(p * nonzero) entries that vary most between the adapters (arXiv 2408.07990).

    One adapter alone varies nowhere, and keeps all it has.
    """
    if len(matrices) == 1:
        return lambda X_MN, _begin: X_MN

    def variance(first: int, last: int) -> torch.Tensor:
        # By hand: torch's `var` over a short first dimension takes fifteen times as long.
        X_TMN = torch.stack([matrix.rows(first, last) for matrix in matrices])
        return X_TMN.sub_(X_TMN.mean(0)).square_().mean(0)

    varying = Matrix(matrices[0].shape, variance)
    (kept,) = largest([varying], int(density * count_nonzero(varying)))

    def keep(X_MN: torch.Tensor, begin: int) -> torch.Tensor:
        return torch.where(kept.mask(varying.rows(begin, begin + X_MN.shape[0]), begin), X_MN, 0.0)

    return keep


def _draws(X_MN: torch.Tensor, begin: int, seed: int, key: str) -> torch.Tensor:
    """Uniform integers below 2^16, one an entry: Philox counts, so a block's numbers need none of the blocks before."""
    words = np.frombuffer(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:16], dtype="<u8")
    rows, columns = X_MN.shape
    first, quads = begin - begin % BLOCK_ROWS, -(-columns // 4)
    drawn: list[np.ndarray[tuple[int, int], np.dtype[np.uint16]]] = []
    for at in range(first, begin + rows, BLOCK_ROWS):
        counter = np.array([0, 0, 0, at // BLOCK_ROWS], dtype=np.uint64)
        raw = np.random.Philox(key=words, counter=counter).random_raw(BLOCK_ROWS * quads)
        drawn.append(raw.astype("<u8", copy=False).view("<u2").reshape(BLOCK_ROWS, 4 * quads))
    chosen = np.concatenate(drawn)[begin - first : begin - first + rows, :columns]
    return torch.from_numpy(chosen.astype(np.int32))


def kept_entries(matrix: Matrix, density: float) -> int:
    """At least one: a basis of few directions has so few entries that a share of them may be none."""
    return max(1, int(density * _entries(matrix)))


def _entries(matrix: Matrix) -> int:
    return matrix.shape[0] * matrix.shape[1]


def _density(settings: Mapping[str, object]) -> float:
    return cast(float, settings["density"])


def _seed(settings: Mapping[str, object]) -> int:
    return cast(int, settings["seed"])
