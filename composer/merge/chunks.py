"""The arithmetic of a merge, a few rows at a time: read -> float32 -> add each delta's rows -> ONE rounding -> write.

Each chunk is an independent job, so reading, computing and writing of different chunks overlap: all three release the
GIL. W, left and right are as stored on disk. Shapes: M rows, N columns, R rank.
"""

import threading
from collections import Counter
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from composer.deltas.delta import Delta, LowRank, Replacement, RowwiseDelta
from composer.deltas.tensors import all_finite, torch_dtype, wait_for
from composer.errors import RefusedOutput
from composer.formats.checkpoints.files import StoredFile
from composer.formats.checkpoints.header import TensorEntry
from composer.formats.recipes.rounding import Mode, Rounding
from composer.merge.io.output_file import BLOCK_BYTES
from composer.merge.io.rounding import round_into
from composer.merge.io.source import Decoded, Source, source_rows

_CHUNK_ELEMENTS = 1 << 20  # 4 MiB in float32; 16 MiB took as much CPU time and four times the memory
_KEPT_BYTES = 8 << 20
_DIRECTIONS = 64  # of factors added in one pass over the rows


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlan:
    """One tensor of an output shard: from `source` in `file`, changed by `deltas`, to `target`."""

    file: StoredFile
    source: TensorEntry
    target: TensorEntry
    deltas: tuple[Delta, ...] = ()
    decoded: Decoded | None = None

    @property
    def copied(self) -> bool:
        """Whether the bytes are copied unchanged."""
        return not self.deltas and self.decoded is None and self.source.dtype == self.target.dtype


@dataclass(frozen=True, slots=True)
class Factors:
    """Some directions of one or several deltas, as stored by the adapters, added to `rows` rows from `begin`.

    Concatenated, they take one pass over the rows: the product of `left` (some rows x R) and `right` (R x N).
    """

    begin: int
    rows: int
    parts: tuple[LowRank, ...]

    @property
    def rank(self) -> int:
        return sum(part.rank for part in self.parts)

    def left_into(self, own: slice, out_MR: torch.Tensor) -> torch.Tensor:
        """Reads rows `own` of the stacked left factors, M x R, into `out_MR`."""
        for part, columns in zip(self.parts, out_MR.split([factor.rank for factor in self.parts], dim=1), strict=True):
            part.stored_left_into(own, columns)
        return out_MR

    def right_into(self, out_RN: torch.Tensor) -> torch.Tensor:
        """Reads the stacked right factors, R x N, into `out_RN`."""
        for part, rows in zip(self.parts, out_RN.split([factor.rank for factor in self.parts]), strict=True):
            part.stored_right_into(rows)
        return out_RN

    def to(self, device: torch.device) -> "Factors":
        return replace(self, parts=tuple(part.to(device) for part in self.parts))


class _Rights:
    """The right factors of one tensor, made once for all threads. At most `_KEPT_BYTES` are kept, so that memory does
    not grow with adapters and ranks."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, torch.dtype], torch.Tensor] = {}
        self._lock = threading.Lock()

    def of(self, factors: Factors, columns: int, dtype: torch.dtype) -> torch.Tensor | None:
        with self._lock:
            right = self._made.get((id(factors), dtype))
            size = factors.rank * columns * dtype.itemsize
            if right is None and size + sum(kept.nbytes for kept in self._made.values()) <= _KEPT_BYTES:
                right = factors.right_into(torch.empty(factors.rank, columns, dtype=dtype))
                self._made[id(factors), dtype] = right
            return right

    def clear(self) -> None:
        with self._lock:
            self._made.clear()


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorWork:
    """A tensor being processed. `rows` x `columns` is the matrix that chunks are cut from; a tensor without deltas is
    one long column. `uploaded` are the factors on the computing device."""

    plan: TensorPlan
    rows: int
    columns: int
    factors: Sequence[Factors]
    uploaded: Sequence[Factors]
    computed: Sequence[RowwiseDelta]
    replacement: torch.Tensor | None
    rights: _Rights = field(default_factory=_Rights)

    @property
    def changed(self) -> bool:
        return bool(self.factors or self.computed)

    def source(self, file: StoredFile) -> Source:
        return Source(file, self.plan.source, self.columns, self.plan.decoded)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows [begin, end) of one tensor."""

    work: TensorWork
    begin: int
    end: int

    @property
    def first_element(self) -> int:
        """Position of the chunk's first value in the tensor."""
        return self.begin * self.work.columns

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.end - self.begin, self.work.columns))

    @property
    def offset(self) -> int:
        """The position in the output file, in bytes."""
        target = self.work.plan.target
        return target.begin + self.first_element * torch_dtype(target.dtype, target.name).itemsize

    @property
    def size_bytes(self) -> int:
        target = self.work.plan.target
        return self.shape.numel() * torch_dtype(target.dtype, target.name).itemsize


def prepare(tensor: TensorPlan, device: torch.device) -> TensorWork:
    """Prepares the work on a tensor. Its factors are uploaded to an accelerator; on the CPU, nothing is read yet."""
    additions = [delta for delta in tensor.deltas if not isinstance(delta, Replacement)]
    replacement = next((delta.tensor.reshape(-1, 1) for delta in tensor.deltas if isinstance(delta, Replacement)), None)
    computed = [addition for addition in additions if isinstance(addition, RowwiseDelta)]
    factors = _together([addition for addition in additions if isinstance(addition, LowRank)])
    shapes = [addition.stored_shape for addition in additions] + ([tensor.decoded.shape] if tensor.decoded else [])
    columns = 1 if replacement is not None or not shapes else shapes[-1][1]
    rows = tensor.target.spec.elements // max(1, columns)
    uploaded = [factor.to(device) for factor in factors]  # once per tensor, not per chunk
    wait_for(device)
    return TensorWork(
        plan=tensor,
        rows=rows,
        columns=columns,
        factors=factors,
        uploaded=uploaded,
        computed=computed,
        replacement=replacement,
    )


def _together(deltas: Sequence[LowRank]) -> list[Factors]:
    """Concatenates factors of the same rows, so that three of rank 16 take one pass instead of three. The number of
    directions per block is limited, so that memory hardly grows with adapters and ranks."""
    slots: dict[tuple[int, int], list[LowRank]] = {}
    for delta in deltas:
        slots.setdefault((delta.begin, delta.stored_shape[0]), []).append(delta)
    return [Factors(*slot, block) for slot, own in slots.items() for block in _blocks(own)]


def _blocks(deltas: Sequence[LowRank]) -> Iterator[tuple[LowRank, ...]]:
    block, room = list[LowRank](), _DIRECTIONS
    for delta in deltas:
        begin = 0
        while begin < delta.rank:
            end = min(delta.rank, begin + room)
            block.append(replace(delta, A=delta.A[begin:end], B=delta.B[:, begin:end]))
            room -= end - begin
            begin = end
            if not room:
                yield tuple(block)
                block, room = [], _DIRECTIONS
    if block:
        yield tuple(block)


def chunks_of(work: TensorWork) -> Iterator[Chunk]:
    """The tensor's rows in chunks of about _CHUNK_ELEMENTS values; in one if a delta needs all rows at once."""
    step = max(1, _CHUNK_ELEMENTS // max(1, work.columns))
    if any(delta.all_rows for delta in work.computed):
        step = max(1, work.rows)
    for begin in range(0, work.rows, step):
        yield Chunk(work, begin, min(work.rows, begin + step))


def _common(chunk: Chunk, begin: int, rows: int) -> tuple[slice, slice] | None:
    """The rows in both: relative to the chunk, and relative to `begin`."""
    first, last = max(chunk.begin, begin), min(chunk.end, begin + rows)
    if first >= last:
        return None
    return slice(first - chunk.begin, last - chunk.begin), slice(first - begin, last - begin)


@dataclass(slots=True)
class RewriteStats:
    """The effect of rewriting on values, counted over all of them, from any number of threads. `changed` is True once
    one differs from the base's in the output's dtype; `flushed` counts by tensor those that float16 made zero."""

    changed: bool = False
    flushed: Counter[str] = field(default_factory=Counter[str])
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def see(self, chunk: Chunk, W_MN: torch.Tensor, out_MN: torch.Tensor) -> None:
        """Compares a chunk's rows of the base with those to be written; a comparison for most merges, since later ones
        cannot change the answer. A replaced tensor counts as changed."""
        if not self.changed and (chunk.work.changed or chunk.work.replacement is not None):
            replaced = chunk.work.replacement is not None
            self.changed = replaced or not torch.equal(W_MN.to(out_MN.dtype), out_MN)

    def count_flushed(self, chunk: Chunk, exact_MN: torch.Tensor, rounded_MN: torch.Tensor) -> None:
        """Counts the values that are zero only in the output: rounding leaves zero as it is."""
        if rounded_MN.dtype is torch.float16 and exact_MN.dtype is not torch.float16:
            lost = int(exact_MN.count_nonzero()) - int(rounded_MN.count_nonzero())
            with self._lock:
                self.flushed[chunk.work.plan.target.name] += lost

    def add(self, other: "RewriteStats") -> None:
        """Adds what was measured elsewhere."""
        with self._lock:
            self.changed = self.changed or other.changed
            self.flushed += other.flushed

    def of(self, names: Collection[str]) -> dict[str, Any]:
        """The measurements as JSON, with the counts of these tensors."""
        with self._lock:
            counts = {name: count for name, count in self.flushed.items() if count and name in names}
            return {"changed": self.changed, "flushed": counts}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "RewriteStats":
        """Parses `of`. Results of before 0.3 have nothing: they count as changed."""
        return cls(bool(row.get("changed", True)), Counter({str(k): int(v) for k, v in row.get("flushed", {}).items()}))


class Rewriter:
    """Computes chunks on one device. Each thread keeps its own buffers (fresh ones cost a page fault per 4 kB); on CUDA
    they are pinned and each thread has its own stream, so that copies overlap with other threads' work. One thread
    computes each chunk from start to end, so its bytes do not depend on any order. The random numbers of stochastic
    rounding are drawn on the CPU, so that they are the same on every device; what they round is computed on it.
    """

    def __init__(self, device: torch.device, rounding: Rounding) -> None:
        self.device = device
        self.rounding = rounding
        self.measured = RewriteStats()
        self._local = threading.local()

    @torch.inference_mode()
    def computed(self, chunk: Chunk, source: StoredFile) -> torch.Tensor:
        """The chunk to write: M x N in the output's dtype, in a buffer that this thread's next chunk reuses. `source`
        is the tensor's file, or another one that has its rows at the same offsets.

        Raises RefusedOutput for a NaN or infinity.
        """
        target = chunk.work.plan.target
        W_MN = self._source(chunk, source)
        out_MN = self._buffer("out", chunk.shape, torch_dtype(target.dtype, target.name), chunk.offset)
        finite = self._on_cpu(chunk, W_MN, out_MN) if self.device.type == "cpu" else self._on_gpu(chunk, W_MN, out_MN)
        if not finite:
            raise _not_finite(target, W_MN)
        self.measured.see(chunk, W_MN, out_MN)
        return out_MN

    def _source(self, chunk: Chunk, source: StoredFile) -> torch.Tensor:
        work = chunk.work
        if work.replacement is not None:
            return work.replacement[chunk.begin : chunk.end]
        if work.plan.decoded is not None:
            return source_rows(work.source(source), chunk.begin, chunk.end)
        stored = self._buffer("in", chunk.shape, torch_dtype(work.plan.source.dtype, work.plan.source.name))
        return source_rows(work.source(source), chunk.begin, chunk.end, stored)

    def _on_cpu(self, chunk: Chunk, W_MN: torch.Tensor, out_MN: torch.Tensor) -> bool:
        if not chunk.work.changed and self._is_plain(W_MN, out_MN):
            out_MN.copy_(W_MN)
            self.measured.count_flushed(chunk, W_MN, out_MN)
            return all_finite(out_MN)
        sum_MN = self._buffer("sum", W_MN.shape, _accumulator(W_MN.dtype))
        sum_MN.copy_(W_MN)
        self._add(chunk.work.factors, chunk, sum_MN)
        return self._rounded(chunk, sum_MN, out_MN)

    def _is_plain(self, W_MN: torch.Tensor, out_MN: torch.Tensor) -> bool:
        """Whether unchanged values need no random number."""
        return self.rounding.mode is Mode.NEAREST or out_MN.dtype == W_MN.dtype or not out_MN.is_floating_point()

    def _rounded(self, chunk: Chunk, sum_MN: torch.Tensor, out_MN: torch.Tensor) -> bool:
        """Rounds a sum on the CPU into `out_MN`, and returns whether all of it is finite."""
        round_into(self.rounding, out_MN, sum_MN, chunk.work.plan.target.name, chunk.first_element)
        self.measured.count_flushed(chunk, sum_MN, out_MN)
        return _fits(sum_MN, out_MN.dtype) or all_finite(out_MN)

    def _on_gpu(self, chunk: Chunk, W_MN: torch.Tensor, out_MN: torch.Tensor) -> bool:
        with self._stream():
            sum_MN = W_MN.to(self.device, non_blocking=True)
            if chunk.work.changed:
                sum_MN = sum_MN.to(_accumulator(W_MN.dtype))
            self._add(chunk.work.uploaded, chunk, sum_MN)
            if self.rounding.mode is Mode.NEAREST or (not chunk.work.changed and self._is_plain(W_MN, out_MN)):
                rounded_MN = sum_MN.to(out_MN.dtype)
                out_MN.copy_(rounded_MN, non_blocking=True)
                self.measured.count_flushed(chunk, sum_MN, rounded_MN)
                return all_finite(rounded_MN)
            exact_MN = self._buffer("sum", W_MN.shape, sum_MN.dtype).copy_(sum_MN, non_blocking=True)
        return self._rounded(chunk, exact_MN, out_MN)

    @contextmanager
    def _stream(self) -> Generator[None]:
        """This thread's own stream on CUDA, whose work has ended when the block has."""
        if self.device.type != "cuda":
            yield
            return
        if not hasattr(self._local, "stream"):
            self._local.stream = torch.cuda.Stream(self.device)
        with torch.cuda.stream(self._local.stream):
            yield
            self._local.stream.synchronize()

    def _add(self, factors: Sequence[Factors], chunk: Chunk, sum_MN: torch.Tensor) -> None:
        """Adds every delta to the base's rows, on their device; `factors` are there too."""
        # All computed deltas read the base's own rows, so they come before anything is added.
        computed = [(rows, delta.rows(sum_MN[rows], own.start)) for rows, own, delta in _computed_within(chunk)]
        for rows, delta_MN in computed:
            sum_MN[rows] += delta_MN
        for factor in factors:
            if common := _common(chunk, factor.begin, factor.rows):
                rows, own = common
                left_MR = self._scratch("left", torch.Size((own.stop - own.start, factor.rank)), sum_MN)
                sum_MN[rows].addmm_(factor.left_into(own, left_MR), self._right(chunk.work, factor, sum_MN))

    def _right(self, work: TensorWork, factors: Factors, sum_MN: torch.Tensor) -> torch.Tensor:
        """The shared right factor, or one kept for this thread's next chunk, which is usually of the same tensor."""
        on_cpu = sum_MN.device.type == "cpu"
        if on_cpu and (shared := work.rights.of(factors, sum_MN.shape[1], sum_MN.dtype)) is not None:
            return shared
        latest: tuple[Factors, torch.Tensor] | None = getattr(self._local, "right", None)
        if latest is None or latest[0] is not factors or latest[1].dtype is not sum_MN.dtype:
            right_RN = self._scratch("right", torch.Size((factors.rank, sum_MN.shape[1])), sum_MN)
            latest = self._local.right = (factors, factors.right_into(right_RN))
        return latest[1]

    def _scratch(self, role: str, shape: torch.Size, like: torch.Tensor) -> torch.Tensor:
        """A buffer with the dtype and device of `like`; on a GPU, torch caches the memory itself."""
        if like.device.type == "cpu":
            return self._buffer(f"{role} factor", shape, like.dtype)
        return torch.empty(shape, dtype=like.dtype, device=like.device)

    def _buffer(self, role: str, shape: torch.Size, dtype: torch.dtype, offset: int = 0) -> torch.Tensor:
        """This thread's buffer, aligned to a block as `offset` is in the file, so that it can be written directly."""
        key = f"{role}.{dtype}"
        flat = getattr(self._local, key, None)
        spare = BLOCK_BYTES // dtype.itemsize
        if flat is None or flat.numel() < shape.numel() + spare:
            pinned = self.device.type == "cuda" and role in ("in", "sum", "out")
            flat = torch.empty(max(_CHUNK_ELEMENTS, shape.numel()) + spare, dtype=dtype, pin_memory=pinned)
            setattr(self._local, key, flat)
        first = (offset - flat.data_ptr()) % BLOCK_BYTES // dtype.itemsize
        return flat[first : first + shape.numel()].view(shape)


def _not_finite(target: TensorEntry, W_MN: torch.Tensor) -> RefusedOutput:
    if all_finite(W_MN):
        message = f"{target.name} would get a NaN, or values too large for {target.dtype}."
        wider = "Merge to fp32 or bf16, and check" if target.dtype == "F16" else "Lower the weights, or check"
        next_step = f"{wider} the adapters (inspect)."
    else:
        message = f"{target.name} already has a NaN or an infinity in the base."
        next_step = "Use another copy of the base."
    return RefusedOutput("not_finite", message, subject=target.name, next_step=next_step)


def _computed_within(chunk: Chunk) -> Iterator[tuple[slice, slice, RowwiseDelta]]:
    for delta in chunk.work.computed:
        if common := _common(chunk, delta.begin, delta.stored_shape[0]):
            yield *common, delta


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _fits(exact: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether the sum of squares proves that all values are finite in the dtype; five times cheaper than checking the
    rounded values. False is inconclusive."""
    if dtype is torch.float64:
        return False
    flat = exact.reshape(-1)
    return float(torch.dot(flat, flat)) < 0.9 * torch.finfo(dtype).max ** 2
