"""Rows of tensors in files. Every value that a merge takes from its base passes `source_rows` or `picked_rows`."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from composer.deltas.tensors import read_all, tensor_bytes, torch_dtype
from composer.formats.checkpoints.header import TensorEntry


@dataclass(frozen=True, slots=True)
class Decoded:
    """A tensor that is stored in another form than its values (quantized): M x N values, decoded a few rows at a time.

    `rows` gives rows [begin, end) in float32. `dtype` is the one they are written in unless the merge is told another.
    """

    shape: tuple[int, int]
    rows: Callable[[int, int], torch.Tensor]
    dtype: str = "BF16"


@dataclass(frozen=True, slots=True)
class Source:
    """Where one tensor's values come from: `entry` of the open file `file`, or what `decoded` makes of it."""

    file: int
    entry: TensorEntry
    columns: int
    decoded: Decoded | None = None


def source_rows(source: Source, begin: int, end: int, buffer: torch.Tensor | None = None) -> torch.Tensor:
    """Rows [begin, end): in the stored dtype, read into `buffer` (end - begin rows of it); decoded ones in float32."""
    if source.decoded is not None:
        return source.decoded.rows(begin, end)
    dtype = torch_dtype(source.entry.dtype, source.entry.name)
    W_MN = torch.empty((end - begin, source.columns), dtype=dtype) if buffer is None else buffer
    offset = source.entry.begin + begin * source.columns * dtype.itemsize
    read_all(source.file, tensor_bytes(W_MN), offset, source.entry.name)
    return W_MN


def picked_rows(source: Source, rows: Sequence[int]) -> torch.Tensor:
    """These rows only, as `source_rows` gives them."""
    if source.decoded is not None:
        return torch.cat([source_rows(source, row, row + 1) for row in rows])
    dtype = torch_dtype(source.entry.dtype, source.entry.name)
    W_MN = torch.empty((len(rows), source.columns), dtype=dtype)
    buffer, size = tensor_bytes(W_MN), source.columns * dtype.itemsize
    for i, row in enumerate(rows):
        read_all(source.file, buffer[i * size : (i + 1) * size], source.entry.begin + row * size, source.entry.name)
    return W_MN


def write_all(file: int, buffer: memoryview, offset: int) -> None:
    while buffer.nbytes:
        count = os.pwrite(file, buffer, offset)
        buffer = buffer[count:]
        offset += count
