"""The arithmetic of a merge, a few rows at a time: read -> float32 -> add each delta's rows -> ONE rounding -> write.

Each chunk is an independent job, so that reading, computing and writing of different chunks overlap: all three let go
of the interpreter. W, left and right are as stored on disk. Shapes: M rows, N columns, R rank.
"""

import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from composer.delta import Additive, Computed, Delta, LowRank, Replacement
from composer.errors import InvalidFile, RefusedOutput
from composer.formats.header import TensorEntry
from composer.tensors import tensor_bytes, torch_dtype

_CHUNK_ELEMENTS = 1 << 20  # 4 MiB in float32: measured, 16 MiB cost as much CPU time and four times the memory
_SAMPLED_ROWS = 8
_SAMPLED_ELEMENTS = 256  # of a tensor that is only cast or replaced
_FLOAT32_EPS = torch.finfo(torch.float32).eps
_COMPUTED_ULPS = 512  # a delta without factors passes norms, rotations or transforms in float32


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One tensor of an output shard: from `source` in file `path`, changed by `deltas`, to `target`."""

    path: Path
    source: TensorEntry
    target: TensorEntry
    deltas: tuple[Delta, ...] = ()

    @property
    def copied(self) -> bool:
        return not self.deltas and self.source.dtype == self.target.dtype

    @property
    def replacement(self) -> torch.Tensor | None:
        """What takes the place of the source, as one long column."""
        found = next((delta for delta in self.deltas if isinstance(delta, Replacement)), None)
        return None if found is None else found.tensor.reshape(-1, 1)

    @property
    def additions(self) -> list[Additive]:
        return [delta for delta in self.deltas if not isinstance(delta, Replacement)]

    @property
    def matrix(self) -> tuple[int, int]:
        """(M, N): rows and columns the chunks are cut from; a tensor that nothing is added to is one long column."""
        elements = self.target.spec.elements
        columns = self.additions[0].stored_shape[1] if self.additions else 1
        return elements // max(1, columns), columns


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows [begin, end) of one tensor, with what is added to the whole tensor."""

    tensor: TensorPlan
    begin: int
    end: int
    factors: "Sequence[Factors]"
    computed: Sequence[Computed]

    @property
    def size_bytes(self) -> int:
        return (self.end - self.begin) * self.tensor.matrix[1] * torch_dtype(self.tensor.target.dtype, "").itemsize


@dataclass(frozen=True, slots=True)
class Factors:
    """left @ right (M x R, R x N) is added to the rows from `begin` of the stored matrix."""

    begin: int
    left: torch.Tensor
    right: torch.Tensor

    def within(self, chunk: Chunk) -> tuple[slice, slice] | None:
        """The rows both have: counted in the chunk, and in `left`."""
        return _common(chunk, self.begin, self.left.shape[0])


def _common(chunk: Chunk, begin: int, rows: int) -> tuple[slice, slice] | None:
    first, last = max(chunk.begin, begin), min(chunk.end, begin + rows)
    if first >= last:
        return None
    return slice(first - chunk.begin, last - chunk.begin), slice(first - begin, last - begin)


def chunks_of(tensor: TensorPlan) -> Iterator[Chunk]:
    rows, columns = tensor.matrix
    factors = [Factors(one.begin, *one.stored_factors()) for one in tensor.additions if isinstance(one, LowRank)]
    computed = [one for one in tensor.additions if isinstance(one, Computed)]
    step = max(1, _CHUNK_ELEMENTS // max(1, columns))
    if any(one.whole for one in computed):
        step = max(1, rows)
    for begin in range(0, rows, step):
        yield Chunk(tensor, begin, min(rows, begin + step), factors, computed)


class Rewriter:
    """Rewrites chunks on one device. Each thread has its own buffers, kept from chunk to chunk (fresh ones cost a
    page fault for every 4 kB), and on CUDA pinned ones and its own stream, so that copies of one thread hide behind
    work of another.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._local = threading.local()

    @torch.inference_mode()
    def rewrite(self, chunk: Chunk, source: int, target: int) -> None:
        """Read the chunk from file `source`, write it to file `target`. Raises RefusedOutput for a NaN or infinity."""
        tensor = chunk.tensor
        dtype = torch_dtype(tensor.target.dtype, tensor.target.name)
        W_MN = self._source(chunk, source)
        out_MN = self._buffer("out", W_MN.shape, dtype)
        if self._device.type == "cuda" and not chunk.computed:
            finite = self._on_cuda(chunk, W_MN, out_MN)
        else:
            finite = self._on_cpu(chunk, W_MN, out_MN)
        if not finite:
            message = f"{tensor.target.name} has values that {tensor.target.dtype} cannot hold, or a NaN."
            raise RefusedOutput(
                "not_finite",
                message,
                subject=tensor.target.name,
                next_step="Merge to fp32 or bf16, and check the inputs.",
            )
        offset = tensor.target.begin + chunk.begin * tensor.matrix[1] * dtype.itemsize
        write_all(target, tensor_bytes(out_MN), offset)

    def _source(self, chunk: Chunk, source: int) -> torch.Tensor:
        tensor = chunk.tensor
        columns = tensor.matrix[1]
        if (replacement := tensor.replacement) is not None:
            return replacement[chunk.begin : chunk.end]
        dtype = torch_dtype(tensor.source.dtype, tensor.source.name)
        W_MN = self._buffer("in", torch.Size((chunk.end - chunk.begin, columns)), dtype)
        read_all(
            source, tensor_bytes(W_MN), tensor.source.begin + chunk.begin * columns * dtype.itemsize, tensor.path.name
        )
        return W_MN

    def _on_cpu(self, chunk: Chunk, W_MN: torch.Tensor, out_MN: torch.Tensor) -> bool:
        if not chunk.factors and not chunk.computed:
            out_MN.copy_(W_MN)
            return _all_finite(out_MN)
        sum_MN = self._buffer("sum", W_MN.shape, _accumulator(W_MN.dtype))
        sum_MN.copy_(W_MN)
        # Each is taken from the base's own rows, so all of them before anything is added.
        computed = [(rows, delta.rows(sum_MN[rows], own.start)) for rows, own, delta in _computed_within(chunk)]
        for rows, delta_MN in computed:
            sum_MN[rows] += delta_MN
        for factors in chunk.factors:
            if common := factors.within(chunk):
                rows, own = common
                sum_MN[rows].addmm_(factors.left[own].to(sum_MN.dtype), factors.right.to(sum_MN.dtype))
        out_MN.copy_(sum_MN)
        return _all_finite(out_MN)

    def _on_cuda(self, chunk: Chunk, W_MN: torch.Tensor, out_MN: torch.Tensor) -> bool:
        if not hasattr(self._local, "stream"):
            self._local.stream = torch.cuda.Stream(self._device)
        with torch.cuda.stream(self._local.stream):
            sum_MN = W_MN.to(self._device, non_blocking=True)
            if chunk.factors:
                sum_MN = sum_MN.to(_accumulator(W_MN.dtype))
            for factors in chunk.factors:
                if common := factors.within(chunk):
                    rows, own = common
                    left_MR = factors.left[own].to(self._device, sum_MN.dtype, non_blocking=True)
                    right_RN = factors.right.to(self._device, sum_MN.dtype, non_blocking=True)
                    sum_MN[rows].addmm_(left_MR, right_RN)
            rounded_MN = sum_MN.to(out_MN.dtype)
            out_MN.copy_(rounded_MN, non_blocking=True)
            finite = _all_finite(rounded_MN)
            self._local.stream.synchronize()
        return finite

    def _buffer(self, role: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        key = f"{role}.{dtype}"
        flat = getattr(self._local, key, None)
        if flat is None or flat.numel() < shape.numel():
            pinned = self._device.type == "cuda" and role != "sum"
            flat = torch.empty(max(_CHUNK_ELEMENTS, shape.numel()), dtype=dtype, pin_memory=pinned)
            setattr(self._local, key, flat)
        return flat[: shape.numel()].view(shape)


@torch.inference_mode()
def confirm(tensor: TensorPlan, source: int, target: int) -> int:
    """Recompute sampled rows of a rewritten tensor in float64 from the base and the deltas; return their number.

    Each written value must lie within half a unit in the last place of its dtype, plus the rounding of R float32
    additions (of a few hundred where a delta is no product of factors). Raises RefusedOutput naming the tensor
    otherwise.
    """
    name, rows = tensor.target.name, tensor.matrix[0]
    count = _SAMPLED_ROWS if tensor.additions else _SAMPLED_ELEMENTS
    # Seeded by the name alone: the same merge is checked at the same places. The first and last row are always among
    # them.
    picks = np.random.default_rng(list(name.encode())).integers(0, rows, count) if rows else np.empty(0, np.int64)
    chosen = sorted({0, rows - 1, *picks.tolist()}) if rows else []
    exact, slack = _exact_rows(tensor, source, chosen)
    written = _read_rows(target, tensor.target, tensor.matrix[1], chosen)
    if written.is_floating_point():
        limits = torch.finfo(written.dtype)
        slack = slack + exact.abs() * (limits.eps / 2) * (1 + 1e-6) + limits.smallest_normal * limits.eps
    if not bool(((written.double() - exact).abs() <= slack).all()):
        message = f"{name} was not written as computed."
        raise RefusedOutput(
            "verification", message, subject=name, next_step="Check the disk and memory, and try again."
        )
    return len(chosen)


def _exact_rows(tensor: TensorPlan, source: int, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(the rows in float64, the error that float32 accumulation may have made in them)."""
    if (replacement := tensor.replacement) is not None:
        exact = replacement[rows].double()
        return exact, torch.zeros_like(exact)
    W = _read_rows(source, tensor.source, tensor.matrix[1], rows).double()
    exact, slack = W.clone(), torch.zeros_like(W)
    for delta in tensor.additions:
        inside = [i for i, row in enumerate(rows) if delta.begin <= row < delta.begin + delta.stored_shape[0]]
        own = [rows[i] - delta.begin for i in inside]
        if isinstance(delta, LowRank):
            left, right = delta.stored_factors()
            left, right = left[own].double(), right.double()
            exact[inside] += left @ right
            slack[inside] += (W[inside].abs() + left.abs() @ right.abs()) * (delta.rank + 4) * _FLOAT32_EPS
        elif own:
            added = _computed_rows(tensor, delta, source, own)
            exact[inside] += added
            slack[inside] += (W[inside].abs() + added.abs().amax(dim=1, keepdim=True)) * _COMPUTED_ULPS * _FLOAT32_EPS
    return exact, slack


def _computed_rows(tensor: TensorPlan, delta: Computed, source: int, own: list[int]) -> torch.Tensor:
    columns = delta.stored_shape[1]

    def base(begin: int, end: int) -> torch.Tensor:
        chosen = list(range(delta.begin + begin, delta.begin + end))
        return _read_rows(source, tensor.source, columns, chosen).double()

    if delta.whole:
        return delta.rows(base(0, delta.stored_shape[0]), 0)[own]
    return torch.cat([delta.rows(base(row, row + 1), row) for row in own])


def _read_rows(file: int, entry: TensorEntry, columns: int, rows: list[int]) -> torch.Tensor:
    """The rows of a tensor in a file, in its own dtype: len(rows) x columns."""
    dtype = torch_dtype(entry.dtype, entry.name)
    row_bytes = columns * dtype.itemsize
    read = torch.empty((len(rows), columns), dtype=dtype)
    buffer = tensor_bytes(read)
    for index, row in enumerate(rows):
        read_all(file, buffer[index * row_bytes : (index + 1) * row_bytes], entry.begin + row * row_bytes, entry.name)
    return read


def read_all(file: int, buffer: memoryview, offset: int, subject: str) -> None:
    """Fill the buffer from `offset`. Raises InvalidFile when the file ends before."""
    while buffer.nbytes:
        count = os.preadv(file, [buffer], offset)
        if count == 0:
            raise InvalidFile("cut_off", f"{subject} became shorter while it was read.", subject=subject)
        buffer = buffer[count:]
        offset += count


def write_all(file: int, buffer: memoryview, offset: int) -> None:
    while buffer.nbytes:
        count = os.pwrite(file, buffer, offset)
        buffer = buffer[count:]
        offset += count


def _computed_within(chunk: Chunk) -> Iterator[tuple[slice, slice, Computed]]:
    for delta in chunk.computed:
        if common := _common(chunk, delta.begin, delta.stored_shape[0]):
            yield *common, delta


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _all_finite(tensor: torch.Tensor) -> bool:
    """A NaN or infinity makes the sum one too: 15 times faster than looking at each value, in bfloat16 on a CPU.

    Large finite values may overflow the sum, so only a finite sum is an answer."""
    if not tensor.dtype.is_floating_point:
        return True
    total = tensor.sum(dtype=torch.float64 if tensor.dtype is torch.float64 else torch.float32)
    return bool(torch.isfinite(total)) or bool(torch.isfinite(tensor).all())
