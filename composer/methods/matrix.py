"""A matrix whose rows are made on demand, and the selection of its largest entries.

Decisions about an entry (whether it is kept, which sign wins) must not depend on how many rows are requested at once,
but a product of few rows may differ from one of many in the last bit. So rows are always made in the same blocks.
Shapes: M rows, N columns.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

BLOCK_ROWS = 64
_MAGNITUDE = 0x7FFF_FFFF  # a float32 without its sign bit: as integers, magnitudes keep their order
_INFINITY = 0x7F80_0000
_LOW_BITS = 15
_NONE = (-1, -1)
_SAMPLED_EVERY = 8
_MARGIN = 0.01


@dataclass(frozen=True, slots=True)
class Matrix:
    """`make(first, last)` returns float32 rows, one complete block of `BLOCK_ROWS` at a time (the last is shorter)."""

    shape: tuple[int, int]
    make: Callable[[int, int], torch.Tensor]

    @classmethod
    def of(cls, X_MN: torch.Tensor) -> "Matrix":
        """A matrix that is in memory."""
        return cls((X_MN.shape[0], X_MN.shape[1]), lambda first, last: X_MN[first:last])

    def rows(self, begin: int, end: int) -> torch.Tensor:
        """Rows `begin` to `end`, computed in complete blocks."""
        first = begin - begin % BLOCK_ROWS
        blocks = [self.make(at, min(at + BLOCK_ROWS, self.shape[0])) for at in range(first, end, BLOCK_ROWS)]
        made = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
        return made[begin - first : end - first]

    def dense(self, pool: ThreadPoolExecutor) -> torch.Tensor:
        """The complete matrix; its blocks are computed in the pool's threads."""
        first_BN = self.make(0, min(BLOCK_ROWS, self.shape[0]))
        X_MN = first_BN.new_empty(self.shape)
        X_MN[: len(first_BN)] = first_BN

        def fill(first: int) -> None:
            last = min(first + BLOCK_ROWS, self.shape[0])
            X_MN[first:last] = self.make(first, last)

        for _ in pool.map(fill, range(BLOCK_ROWS, self.shape[0], BLOCK_ROWS)):
            pass
        return X_MN

    def blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yields (first row, rows) of every block, in order."""
        for first in range(0, self.shape[0], BLOCK_ROWS):
            yield first, self.make(first, min(first + BLOCK_ROWS, self.shape[0]))


@dataclass(frozen=True, slots=True)
class Largest:
    """The k largest magnitudes of one matrix: those above `threshold`, and the first of those equal to it.

    `cut` is the row and column of the last equal one that belongs; (-1, -1) if none does.
    """

    threshold: int
    cut: tuple[int, int]

    def mask(self, X_MN: torch.Tensor, begin: int) -> torch.Tensor:
        """The mask of selected entries in the rows from `begin`."""
        bits, row = magnitude_bits(X_MN), self.cut[0] - begin
        mask = bits > self.threshold
        mask[: max(0, row)] |= bits[: max(0, row)] == self.threshold
        if 0 <= row < len(bits):
            mask[row, : self.cut[1] + 1] |= bits[row, : self.cut[1] + 1] == self.threshold
        return mask

    def kept(self, X_MN: torch.Tensor, begin: int) -> torch.Tensor:
        """The rows from `begin` with all other entries set to zero, in one pass except for the row of the cut."""
        row = self.cut[0] - begin
        if 0 <= row < X_MN.shape[0]:
            return torch.where(self.mask(X_MN, begin), X_MN, 0.0)
        bits = self.threshold if row < 0 else self.threshold - 1
        return X_MN if bits < 0 else torch.nn.functional.hardshrink(X_MN, float(np.int32(bits).view(np.float32)))


def largest(matrices: Sequence[Matrix], k: int) -> list[Largest]:
    """Selects the k largest magnitudes of all matrices together; ties go in the order of matrices, rows, columns.

    A sample brackets the k-th magnitude, then one pass counts what lies above and keeps the few within. If the bracket
    misses, a histogram of bit patterns brackets it with certainty. Nothing of the matrices' size is kept.
    """
    total = sum(matrix.shape[0] * matrix.shape[1] for matrix in matrices)
    if k <= 0:
        return [Largest(_INFINITY, _NONE) for _ in matrices]
    if k >= total:
        return [Largest(0, _all_of(matrix)) for matrix in matrices]
    result = _search(matrices, k, *_guess(matrices, k / total))
    while result is None:
        result = _search(matrices, k, *_certain(matrices, k))
    threshold, ties, equal = result
    if ties == equal:
        return [Largest(threshold, _all_of(matrix)) for matrix in matrices]
    kept: list[Largest] = []
    for matrix in matrices:
        cut, ties = _cut(matrix, threshold, ties)
        kept.append(Largest(threshold, cut))
    return kept


def _all_of(matrix: Matrix) -> tuple[int, int]:
    return matrix.shape[0], 0


def _cut(matrix: Matrix, threshold: int, ties: int) -> tuple[tuple[int, int], int]:
    """(position of the last of `ties` equal entries, how many are left for the next matrix)."""
    if ties <= 0:
        return _NONE, 0
    for first, X_MN in matrix.blocks():
        rows_and_columns = (magnitude_bits(X_MN) == threshold).nonzero()
        if len(rows_and_columns) >= ties:
            row, column = rows_and_columns[ties - 1].cpu().tolist()
            return (first + row, column), 0
        ties -= len(rows_and_columns)
    return _all_of(matrix), ties


def _guess(matrices: Sequence[Matrix], share: float) -> tuple[int, int]:
    """Bit patterns (low, high) that should bracket the k-th magnitude, from a sample of blocks and entries."""
    sampled: list[torch.Tensor] = []
    for matrix in matrices:
        last = -(-matrix.shape[0] // BLOCK_ROWS) - 1
        for number in {0, last, *range(_SAMPLED_EVERY // 2, last, _SAMPLED_EVERY)}:
            rows = matrix.make(number * BLOCK_ROWS, min(matrix.shape[0], (number + 1) * BLOCK_ROWS))
            sampled.append(magnitude_bits(rows).reshape(-1)[::_SAMPLED_EVERY])
    ordered = _descending(torch.cat(sampled))
    position, margin = share * len(ordered), max(16.0, _MARGIN * len(ordered))
    first, end = max(0, int(position - margin)), min(len(ordered) - 1, int(position + margin))
    return int(ordered[end]), int(ordered[first])


def _search(matrices: Sequence[Matrix], k: int, low: int, high: int) -> tuple[int, int, int] | None:
    """(bits of the k-th magnitude, equal ones that belong, equal ones in total); None if outside the bracket."""
    above, at_high, at_low, inside = 0, 0, 0, list[torch.Tensor]()
    for matrix in matrices:
        for _, X_MN in matrix.blocks():
            bits = magnitude_bits(X_MN)
            above += int((bits > high).sum())
            near = bits[(bits >= low) & (bits <= high)]
            at_high += int((near == high).sum())
            at_low += int((near == low).sum())
            inside.append(near[(near > low) & (near < high)])
    wanted = k - above
    if wanted <= 0:
        return None
    if wanted <= at_high:
        return high, wanted, at_high
    between = _descending(torch.cat(inside))
    wanted -= at_high
    if wanted <= len(between):
        value = int(between[wanted - 1])
        return value, wanted - int((between > value).sum()), int((between == value).sum())
    wanted -= len(between)
    return (low, wanted, at_low) if low < high and wanted <= at_low else None


def _descending(bits: torch.Tensor) -> torch.Tensor:
    return sorted_rows(bits).flip(0)


def sorted_rows(values: torch.Tensor) -> torch.Tensor:
    """Integers in ascending order along the last dimension."""
    if values.device.type != "cpu":
        return values.sort().values
    return torch.from_numpy(np.sort(values.numpy()))  # numpy sorts integers ten times as fast as torch


def _certain(matrices: Sequence[Matrix], k: int) -> tuple[int, int]:
    """The range of bit patterns with the k-th magnitude's upper bits."""
    counts = np.zeros(1 << 16, dtype=np.int64)
    for matrix in matrices:
        for _, X_MN in matrix.blocks():
            upper_bits = (magnitude_bits(X_MN) >> _LOW_BITS).reshape(-1)
            counts += upper_bits.bincount(minlength=len(counts)).cpu().numpy()
    from_top = np.cumsum(counts[::-1])
    upper = len(counts) - 1 - int(np.searchsorted(from_top, k))
    return upper << _LOW_BITS, ((upper + 1) << _LOW_BITS) - 1


def count_nonzero(matrix: Matrix) -> int:
    return sum(int(X_MN.count_nonzero()) for _, X_MN in matrix.blocks())


def square_sum(matrix: Matrix) -> float:
    """|X|_F^2, in float64."""
    return sum(float(X_MN.double().square().sum()) for _, X_MN in matrix.blocks())


def magnitude_bits(X_MN: torch.Tensor) -> torch.Tensor:
    """Integers that order like the magnitudes."""
    return X_MN.contiguous().view(torch.int32) & _MAGNITUDE
