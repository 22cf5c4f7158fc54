"""Streams a planned shard to a sink, block by block in file order, without using a disk.

One read fetches neighbouring rows of several tensors. A small pool computes the same chunks as a merge on disk, so the
bytes are equal. The caller's thread hands the blocks in order to the sink, which hashes them. Memory holds the blocks
that were read ahead, and one full tensor when a delta needs all of its rows at once.

Every byte of the base is read once, and that read also feeds the tensors' hashes: together, the hashes of all shards
prove which base was merged.
"""

import hashlib
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch

from composer.deltas.delta import Replacement
from composer.deltas.tensors import tensor_bytes, torch_dtype, torch_threads
from composer.errors import NotSupported
from composer.formats.checkpoints.files import StoredFile
from composer.formats.checkpoints.header import TensorEntry
from composer.merge.chunks import Chunk, Rewriter, TensorPlan, TensorWork, chunks_of, prepare
from composer.merge.plan import MergePlan
from composer.merge.rounding_loss import RoundingLoss, confirm, sampled_rows, unconfirmed
from composer.merge.shards import Progress, ShardPlan

READ_BYTES = 8 << 20
"""The most that one read fetches, unless a delta needs more rows at once."""
_AHEAD_BYTES = 64 << 20  # read or computed, and not yet written
_READERS = 8  # each waits for an answer most of the time
_MOST_UNCONFIRMED = 16  # tensors, whose factors stay in memory


@dataclass(frozen=True, slots=True)
class Origin:
    """The position of the same bytes in a file of the base."""

    file: StoredFile
    offset: int


class Sink(Protocol):
    """Takes the bytes of a file in order."""

    def write(self, block: memoryview, origin: Origin | None) -> None:
        """Takes the next bytes, which are valid until it returns. A store may copy those with an `origin` itself."""
        ...

    def finish(self) -> str:
        """Ends the file, and returns the sha256 of its bytes in hex."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamedShard:
    """A shard that a sink has received completely. `survivals` are by tensor; `tensor_hashes` has the sha256 of each of
    the base's tensors that were read with it. `measured` is what `RewriteStats` counted, as JSON."""

    file: str
    sha256: str
    size_bytes: int
    copied_bytes: int
    rewritten_bytes: int
    survivals: Mapping[str, RoundingLoss]
    tensor_hashes: Mapping[str, str]
    measured: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "StreamedShard":
        known = {name: row[name] for name in cls.__dataclass_fields__ if name in row}
        survivals = {name: RoundingLoss(**survival) for name, survival in row["survivals"].items()}
        return cls(**{**known, "survivals": survivals})


def stream_shard(
    plan: MergePlan, shard: ShardPlan, sink: Sink, rewriter: Rewriter, progress: Progress | None = None
) -> StreamedShard:
    """Writes one shard of the plan to the sink. `progress` is called from this thread with the bytes just written, and
    may raise Interrupted.

    Raises NotSupported for a quantized base, RefusedOutput for a value too large for the output's dtype or a sampled
    row that differs from the plan, and errors of the base's files and of the sink; the sink then has a part of the
    file.
    """
    if any(tensor.decoded for tensor in shard.tensors):
        raise NotSupported(
            "quantized_base",
            f"{shard.file} is quantized, and is decoded only from files on this machine.",
            subject=shard.file,
            next_step="Download the base, and merge it there.",
        )
    with ExitStack() as stack:
        stack.enter_context(torch_threads(1))  # as on a disk: the parallelism is the pool's
        pools = [_pool(stack, name, count) for name, count in _THREADS.items()]
        stream = _Stream(shard, sink, rewriter, progress or (lambda count: None), *pools)
        return stream.run(unwritten(plan, shard))


def unwritten(plan: MergePlan, shard: ShardPlan) -> list[tuple[StoredFile, TensorEntry]]:
    """The base's tensors that are only hashed with this shard: those of its file that it does not read, and with the
    first shard also those of files that the output lacks."""
    files = {shard.file}
    if shard.file == plan.shards[0].file:
        files |= plan.checkpoint.shards.keys() - {other.file for other in plan.shards}
    read = {tensor.source.name for tensor in shard.tensors if _is_its_own(shard, tensor)}
    return [
        (plan.checkpoint.files[file], entry)
        for file in sorted(files)
        for name, entry in plan.checkpoint.shards[file].tensors.items()
        if name not in read
    ]


_THREADS = {"read": _READERS, "compute": max(2, os.cpu_count() or 1), "hash": 1}


def _pool(stack: ExitStack, name: str, count: int) -> ThreadPoolExecutor:
    pool = ThreadPoolExecutor(count, name)
    stack.callback(pool.shutdown, wait=True, cancel_futures=True)
    return pool


def _is_its_own(shard: ShardPlan, tensor: TensorPlan) -> bool:
    """Whether the tensor's source is the base's tensor of that name: an untied head is made of the embedding."""
    return (
        tensor.file == shard.source
        and tensor.source.name == tensor.target.name
        and not any(isinstance(delta, Replacement) for delta in tensor.deltas)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Span:
    """Bytes [begin, end) of a base's file, and their use: chunks of `work`, the same bytes (`copied`), or
    nothing. `hashed` is the tensor that they are part of, if its hash is taken here."""

    file: StoredFile
    begin: int
    end: int
    hashed: str | None = None
    copied: bool = False
    work: TensorWork | None = None
    chunks: tuple[Chunk, ...] = ()

    @property
    def needs_all_rows(self) -> bool:
        return self.work is not None and any(delta.all_rows for delta in self.work.computed)


def _spans(shard: ShardPlan, device: torch.device, unread: Iterable[tuple[StoredFile, TensorEntry]]) -> Iterator[_Span]:
    for tensor in shard.tensors:
        hashed = tensor.source.name if _is_its_own(shard, tensor) else None
        if tensor.copied:
            yield from _pieces(tensor.file, tensor.source, hashed, copied=True)
        else:
            yield from _rewritten(tensor, device, hashed)
    for file, entry in unread:
        yield from _pieces(file, entry, entry.name)


def _pieces(file: StoredFile, entry: TensorEntry, hashed: str | None, *, copied: bool = False) -> Iterator[_Span]:
    for begin in range(entry.begin, entry.end, READ_BYTES):
        yield _Span(file=file, begin=begin, end=min(entry.end, begin + READ_BYTES), hashed=hashed, copied=copied)


def _rewritten(tensor: TensorPlan, device: torch.device, hashed: str | None) -> Iterator[_Span]:
    work = prepare(tensor, device)
    row_bytes = 0  # a replaced tensor reads nothing of the base
    if work.replacement is None:
        row_bytes = work.columns * torch_dtype(tensor.source.dtype, tensor.source.name).itemsize
    for chunks in _together(chunks_of(work)):
        begin, end = (tensor.source.begin + row * row_bytes for row in (chunks[0].begin, chunks[-1].end))
        yield _Span(file=tensor.file, begin=begin, end=end, hashed=hashed, work=work, chunks=chunks)


def _together(chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, ...]]:
    """Neighbouring chunks of about READ_BYTES."""
    group = list[Chunk]()
    for chunk in chunks:
        if group and sum(queued.size_bytes for queued in group) + chunk.size_bytes > READ_BYTES:
            yield tuple(group)
            group = []
        group.append(chunk)
    if group:
        yield tuple(group)


def _batches(spans: Iterable[_Span]) -> Iterator[list[_Span]]:
    """Neighbours in one file that one read fetches together."""
    batch = list[_Span]()
    for span in spans:
        follows = batch and batch[-1].file == span.file and batch[-1].end == span.begin
        if batch and not (follows and span.end - batch[0].begin <= READ_BYTES):
            yield batch
            batch = []
        batch.append(span)
    if batch:
        yield batch


class _Blocks:
    """Memory for blocks of up to READ_BYTES, used again. Freed blocks stay with the thread that made them: a process
    took 500 MB instead of 400; fresh pages for each took 1.7 times the time."""

    def __init__(self) -> None:
        self._free: deque[bytearray] = deque()

    def take(self, size_bytes: int) -> memoryview:
        if not READ_BYTES // 4 <= size_bytes <= READ_BYTES:
            return memoryview(bytearray(size_bytes))
        try:
            block = self._free.pop()
        except IndexError:
            block = bytearray(READ_BYTES)
        return memoryview(block)[:size_bytes]

    def give_back(self, block: memoryview) -> None:
        if READ_BYTES // 4 <= block.nbytes <= READ_BYTES and isinstance(block.obj, bytearray):
            self._free.append(block.obj)


@dataclass(frozen=True, slots=True)
class _Window:
    """A part of a file that is in memory. Bytes outside of it are read again."""

    file: StoredFile
    begin: int
    block: memoryview

    @property
    def name(self) -> str:
        return self.file.name

    @property
    def size_bytes(self) -> int:
        return self.file.size_bytes

    def read_into(self, buffer: memoryview, offset: int) -> None:
        first = offset - self.begin
        if first >= 0 and first + buffer.nbytes <= self.block.nbytes:
            buffer[:] = self.block[first : first + buffer.nbytes]
        else:
            self.file.read_into(buffer, offset)


@dataclass(frozen=True, slots=True)
class _SampledRows:
    """The sampled rows of one tensor, as they passed: their bytes by offset in the file."""

    name: str
    size_bytes: int
    rows: dict[int, bytes] = field(default_factory=dict[int, bytes])

    def read_into(self, buffer: memoryview, offset: int) -> None:
        row = self.rows.get(offset, b"")
        if len(row) != buffer.nbytes:
            raise unconfirmed(self.name, f"the row at {offset} did not pass")
        buffer[:] = row


@dataclass(slots=True)
class _Sample:
    """The sample for confirming a tensor: rows of the base and as written."""

    work: TensorWork
    source: _SampledRows
    target: _SampledRows
    base: StoredFile
    left: list[int]

    @classmethod
    def of(cls, work: TensorWork) -> "_Sample":
        source, target = work.plan.source, work.plan.target
        rows = _SampledRows(source.name, source.end)
        return cls(work, rows, _SampledRows(target.name, target.end), rows, sampled_rows(work))

    def keep(self, span: _Span, block: memoryview, made: memoryview) -> None:
        """Keeps the sampled rows of a span; all rows for a delta that needs them."""
        work, first, last = self.work, span.chunks[0].begin, span.chunks[-1].end
        if span.needs_all_rows:
            self.base = _Window(span.file, span.begin, block)
        while self.left and self.left[0] < last:
            row = self.left.pop(0)
            if work.replacement is None:
                self._keep(self.source, work.plan.source, row, block[: span.end - span.begin], row - first)
            self._keep(self.target, work.plan.target, row, made, row - first)

    def _keep(self, rows: _SampledRows, entry: TensorEntry, row: int, block: memoryview, number: int) -> None:
        size = self.work.columns * torch_dtype(entry.dtype, entry.name).itemsize
        rows.rows[entry.begin + row * size] = bytes(block[number * size : (number + 1) * size])


@dataclass(frozen=True, slots=True)
class _Batch:
    """Neighbouring spans: their bytes, and the results of each."""

    spans: Sequence[_Span]
    read: "Future[memoryview]"
    made: Sequence["Future[memoryview] | None"]

    @property
    def size_bytes(self) -> int:
        """The bytes that it occupies in memory, read and computed."""
        made = sum(chunk.size_bytes for span in self.spans for chunk in span.chunks)
        return self.spans[-1].end - self.spans[0].begin + made


class _Stream:
    """The run of one shard."""

    def __init__(
        self, shard: ShardPlan, sink: Sink, rewriter: Rewriter, report: Progress, *pools: ThreadPoolExecutor
    ) -> None:
        self._shard, self._sink, self._rewriter, self._report = shard, sink, rewriter, report
        self._reading, self._computing, self._hashing = pools
        self._position = self._copied = 0
        self._hashes: dict[str, Any] = {}
        self._blocks = _Blocks()
        self._sample: _Sample | None = None
        self._confirming: deque[tuple[str, Future[RoundingLoss]]] = deque()
        self._survivals: dict[str, RoundingLoss] = {}

    def run(self, unread: Sequence[tuple[StoredFile, TensorEntry]]) -> StreamedShard:
        shard = self._shard
        own = [tensor.source.name for tensor in shard.tensors if _is_its_own(shard, tensor)]
        self._hashes = {name: hashlib.sha256() for name in (*own, *(entry.name for _, entry in unread))}
        self._emit(memoryview(shard.head), None)
        ahead: deque[_Batch] = deque()
        for spans in _batches(_spans(shard, self._rewriter.device, unread)):
            ahead.append(self._start(spans))
            while sum(batch.size_bytes for batch in ahead) > _AHEAD_BYTES:
                self._take(ahead.popleft())
        while ahead:
            self._take(ahead.popleft())
        self._confirm_until(0)
        if self._position != shard.size_bytes:
            raise unconfirmed(shard.file, f"it has {self._position} bytes, not {shard.size_bytes}")
        return StreamedShard(
            file=shard.file,
            sha256=self._sink.finish(),
            size_bytes=self._position,
            copied_bytes=self._copied,
            rewritten_bytes=self._position - self._copied,
            survivals=self._survivals,
            tensor_hashes={name: digest.hexdigest() for name, digest in self._hashes.items()},
            measured=self._rewriter.measured.of({tensor.target.name for tensor in shard.tensors}),
        )

    def _start(self, spans: list[_Span]) -> _Batch:
        begin = spans[0].begin
        read = self._reading.submit(self._read, spans[0].file, begin, spans[-1].end)
        made = [self._computing.submit(self._compute, span, read, begin) if span.chunks else None for span in spans]
        return _Batch(spans, read, made)

    def _read(self, file: StoredFile, begin: int, end: int) -> memoryview:
        block = self._blocks.take(end - begin)
        file.read_into(block, begin)
        return block

    def _compute(self, span: _Span, read: "Future[memoryview]", begin: int) -> memoryview:
        source = _Window(span.file, begin, read.result())
        made = self._blocks.take(sum(chunk.size_bytes for chunk in span.chunks))
        done = 0
        for chunk in span.chunks:
            block = tensor_bytes(self._rewriter.computed(chunk, source))
            made[done : done + block.nbytes] = block
            done += block.nbytes
        return made

    def _take(self, batch: _Batch) -> None:
        """Hashes and writes the results of a batch."""
        content = batch.read.result()
        for span, computed in zip(batch.spans, batch.made, strict=True):
            block = content[span.begin - batch.spans[0].begin :][: span.end - span.begin]
            hashing = self._hashing.submit(self._hashes[span.hashed].update, block) if span.hashed else None
            if span.copied:
                self._copied += block.nbytes
                self._emit(block, Origin(span.file, span.begin))
            elif computed is not None and span.work is not None:
                out = computed.result()
                self._emit_computed(span, span.work, block, out)
                self._blocks.give_back(out)
            if hashing is not None:
                hashing.result()
        if not any(span.needs_all_rows for span in batch.spans):  # its confirmation reads the block
            self._blocks.give_back(content)

    def _emit_computed(self, span: _Span, work: TensorWork, block: memoryview, out: memoryview) -> None:
        if self._sample is None:
            self._sample = _Sample.of(work)
        if span.chunks[0].offset != self._position:
            raise unconfirmed(work.plan.target.name, f"it is at {self._position}, not at {span.chunks[0].offset}")
        self._emit(out, None)
        self._sample.keep(span, block, out)
        if span.chunks[-1].end == work.rows:
            work.rights.clear()
            sample, self._sample = self._sample, None
            rounding = self._rewriter.rounding
            confirming = self._computing.submit(confirm, work, sample.base, sample.target, rounding)
            self._confirming.append((work.plan.target.name, confirming))
            self._confirm_until(_MOST_UNCONFIRMED)

    def _emit(self, block: memoryview, origin: Origin | None) -> None:
        self._sink.write(block, origin)
        self._position += block.nbytes
        self._report(block.nbytes)

    def _confirm_until(self, left: int) -> None:
        while len(self._confirming) > left:
            name, confirming = self._confirming.popleft()
            self._survivals[name] = confirming.result()
