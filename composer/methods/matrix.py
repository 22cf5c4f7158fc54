"""A matrix whose rows are made when they are asked for, and which of its entries are the largest.

What is decided about an entry (is it kept, which sign wins) must not depend on how many rows were asked for at once:
a product of a few rows may differ from one of many in the last bit. So rows are always made in the same blocks.
Shapes: M rows, N columns.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

BLOCK_ROWS = 64
_MAGNITUDE = 0x7FFF_FFFF  # a float32 without its sign: as integers, magnitudes keep their order
_LOW_BITS = 15


@dataclass(frozen=True, slots=True)
class Matrix:
    """`make(first, last)` gives float32 rows, of one whole block of `BLOCK_ROWS` at a time (the last is shorter)."""

    shape: tuple[int, int]
    make: Callable[[int, int], torch.Tensor]

    @classmethod
    def of(cls, X_MN: torch.Tensor) -> "Matrix":
        return cls((X_MN.shape[0], X_MN.shape[1]), lambda first, last: X_MN[first:last])

    def rows(self, begin: int, end: int) -> torch.Tensor:
        first = begin - begin % BLOCK_ROWS
        blocks = [self.make(at, min(at + BLOCK_ROWS, self.shape[0])) for at in range(first, end, BLOCK_ROWS)]
        made = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
        return made[begin - first : end - first]

    def blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, rows) of every block, in order."""
        for first in range(0, self.shape[0], BLOCK_ROWS):
            yield first, self.make(first, min(first + BLOCK_ROWS, self.shape[0]))


@dataclass(frozen=True, slots=True)
class Largest:
    """The k largest magnitudes of one matrix: those above `threshold`, and of those equal to it the first ones.

    `ties_before` counts, for each row, the equal ones in the rows before; None where all of them belong.
    """

    threshold: int
    ties: int
    ties_before: torch.Tensor | None

    def mask(self, X_MN: torch.Tensor, begin: int) -> torch.Tensor:
        """Which entries of the rows from `begin` are among them."""
        bits = _bits(X_MN)
        if self.ties_before is None:
            return bits >= self.threshold
        equal = bits == self.threshold
        rank = equal.cumsum(1) + self.ties_before[begin : begin + X_MN.shape[0], None]
        return (bits > self.threshold) | (equal & (rank <= self.ties))


def largest(matrices: Sequence[Matrix], k: int) -> list[Largest]:
    """The k largest magnitudes of all matrices together; equal ones are taken in the order of matrices, rows, columns.

    Two passes that count bit patterns: nothing of the matrices' size is kept or sorted.
    """
    total = sum(matrix.shape[0] * matrix.shape[1] for matrix in matrices)
    if k <= 0:
        return [Largest(_MAGNITUDE, 0, torch.zeros(matrix.shape[0], dtype=torch.int64)) for matrix in matrices]
    if k >= total:
        return [Largest(0, 0, None) for _ in matrices]
    coarse = _histogram(matrices, lambda bits: bits >> _LOW_BITS, 1 << 16)
    high, above = _reach(coarse, k)
    fine = _histogram(matrices, lambda bits: bits[bits >> _LOW_BITS == high] & ((1 << _LOW_BITS) - 1), 1 << _LOW_BITS)
    low, within = _reach(fine, k - above)
    threshold, ties = (high << _LOW_BITS) | low, k - above - within
    if ties == int(fine[low]):
        return [Largest(threshold, ties, None) for _ in matrices]
    found: list[Largest] = []
    for matrix in matrices:
        counts = torch.cat([(_bits(X_MN) == threshold).sum(1) for _, X_MN in matrix.blocks()])
        found.append(Largest(threshold, max(ties, 0), counts.cumsum(0) - counts))
        ties -= int(counts.sum())
    return found


def count_nonzero(matrix: Matrix) -> int:
    return sum(int(X_MN.count_nonzero()) for _, X_MN in matrix.blocks())


def square_sum(matrix: Matrix) -> float:
    """|X|_F^2, in float64."""
    return sum(float(X_MN.double().square().sum()) for _, X_MN in matrix.blocks())


def _bits(X_MN: torch.Tensor) -> torch.Tensor:
    return X_MN.contiguous().view(torch.int32) & _MAGNITUDE


def _histogram(
    matrices: Sequence[Matrix], of: Callable[[torch.Tensor], torch.Tensor], bins: int
) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    counts = np.zeros(bins, dtype=np.int64)
    for matrix in matrices:
        for _, X_MN in matrix.blocks():
            counts += np.bincount(of(_bits(X_MN)).reshape(-1).numpy(), minlength=bins)
    return counts


def _reach(counts: "np.ndarray[tuple[int], np.dtype[np.int64]]", k: int) -> tuple[int, int]:
    """(the bin, from the top, in which the k-th lies; how many lie above it)."""
    from_top = np.cumsum(counts[::-1])
    place = int(np.searchsorted(from_top, k))
    return len(counts) - 1 - place, int(from_top[place] - counts[::-1][place])
