"""Rows of tensors in files. Every base value in a merge goes through `source_rows` or `picked_rows`."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from composer.deltas.tensors import tensor_bytes, torch_dtype
from composer.formats.checkpoints.files import StoredFile
from composer.formats.checkpoints.header import TensorEntry


@dataclass(frozen=True, slots=True)
class Decoded:
    """A quantized tensor: M x N values, decoded a few rows at a time.

    `rows` returns rows [begin, end) in float32. `dtype` is the output dtype unless the merge sets another.
    """

    shape: tuple[int, int]
    rows: Callable[[int, int], torch.Tensor]
    dtype: str = "BF16"


@dataclass(frozen=True, slots=True)
class Source:
    """The source of one tensor's values: `entry` of `file`, or its `decoded` form."""

    file: StoredFile
    entry: TensorEntry
    columns: int
    decoded: Decoded | None = None


def source_rows(source: Source, begin: int, end: int, buffer: torch.Tensor | None = None) -> torch.Tensor:
    """Rows [begin, end) in the stored dtype, read into `buffer` (end - begin rows of it); decoded ones in float32."""
    if source.decoded is not None:
        return source.decoded.rows(begin, end)
    dtype = torch_dtype(source.entry.dtype, source.entry.name)
    W_MN = torch.empty((end - begin, source.columns), dtype=dtype) if buffer is None else buffer
    offset = source.entry.begin + begin * source.columns * dtype.itemsize
    source.file.read_into(tensor_bytes(W_MN), offset)
    return W_MN


def picked_rows(source: Source, rows: Sequence[int]) -> torch.Tensor:
    """Only these rows, as `source_rows` returns them."""
    if source.decoded is not None:
        return torch.cat([source_rows(source, row, row + 1) for row in rows])
    dtype = torch_dtype(source.entry.dtype, source.entry.name)
    W_MN = torch.empty((len(rows), source.columns), dtype=dtype)
    buffer, size = tensor_bytes(W_MN), source.columns * dtype.itemsize
    for i, row in enumerate(rows):
        source.file.read_into(buffer[i * size : (i + 1) * size], source.entry.begin + row * size)
    return W_MN


def write_all(file: int, buffer: memoryview, offset: int) -> None:
    """Writes the complete buffer at the offset; a single pwrite may write less."""
    while buffer.nbytes:
        count = os.pwrite(file, buffer, offset)
        buffer = buffer[count:]
        offset += count
