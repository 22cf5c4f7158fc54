"""Runs a merge plan: the kernel copies what no adapter touches, threads rewrite the rest, and everything is verified.

Jobs run in file order with a bounded number in flight, so that memory holds a few chunks. The job that copies a piece
also compares it, while it is cached. Disk waits have their own threads: syncing written data, and reading back samples
of each finished tensor.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from composer.deltas.tensors import tensor_bytes, torch_threads
from composer.formats.checkpoints.header import read_header
from composer.merge.chunks import Chunk, Rewriter, TensorPlan, TensorWork, chunks_of, prepare
from composer.merge.copying import Range, clone_file, copied_ranges, copy_range, equal, pieces
from composer.merge.io.journal import Journal
from composer.merge.io.output_file import OutputFile
from composer.merge.io.source import write_all
from composer.merge.rounding_loss import RoundingLoss, confirm, unconfirmed

_SYNC_THREADS = 4
_CONFIRMING_THREADS = 2
_MOST_WORKERS = 16  # two per core: one waits for the disk while the other computes; each has 8 MB of buffers
_MOST_UNCONFIRMED = 16  # tensors; the factors of each stay in memory until then

Progress = Callable[[int], None]
Job = Callable[[], Future[RoundingLoss] | None]
Jobs = Sequence[tuple[str, Future[Future[RoundingLoss] | None]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardPlan:
    """One output file: its first bytes (length and header), its size, and its tensors in file order."""

    file: str
    path: Path
    head: bytes
    size_bytes: int
    tensors: tuple[TensorPlan, ...]

    @property
    def rewritten(self) -> bool:
        return not all(tensor.copied for tensor in self.tensors)


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """`resumed_bytes` belong to shards that an earlier run had finished; `survivals` are by tensor name."""

    copied_bytes: int
    rewritten_bytes: int
    resumed_bytes: int
    verified_rows: int
    survivals: dict[str, RoundingLoss]


class _Countdown:
    """Detects the last of several threads."""

    def __init__(self, count: int) -> None:
        self._left = count
        self._lock = threading.Lock()

    def last(self) -> bool:
        with self._lock:
            self._left -= 1
            return self._left == 0


def write_shards(
    shards: Sequence[ShardPlan], journal: Journal, rewriter: Rewriter, progress: Progress | None
) -> Written:
    """Writes all shards into the journal's directory, synced and verified; finished ones are only verified.

    Raises what a job raises, once the running ones end.
    """
    with ExitStack() as stack:
        # Closed after the pools have ended: a closed descriptor may be reused while a job still writes to it.
        files = stack.enter_context(ExitStack())
        sources = {path: _opened(path, files) for path in _paths(shards)}
        # The pool is the parallelism: chunks are too small to share.
        stack.enter_context(torch_threads(1))
        workers = min(2 * max(2, os.cpu_count() or 1), _MOST_WORKERS)
        pool = stack.enter_context(_cancelling_pool(workers, "merge"))
        confirming = stack.enter_context(_cancelling_pool(_CONFIRMING_THREADS, "confirm"))
        disk = stack.enter_context(_cancelling_pool(_SYNC_THREADS, "sync"))
        changed = [tensor for shard in shards for tensor in shard.tensors if not tensor.copied]
        works = (prepare(tensor, rewriter.device) for tensor in changed)
        syncing: list[Future[None]] = []
        queue = _Queue(pool, 2 * workers)
        ends: list[Future[dict[str, RoundingLoss]]] = []
        resumed = 0

        def sync(file: int) -> None:
            syncing.append(disk.submit(os.fdatasync, file))

        for shard in shards:
            fresh = not journal.holds(shard.file)
            resumed += 0 if fresh else shard.size_bytes
            target = OutputFile.opened(journal.directory / shard.file, fresh, sync, files)
            run = _ShardRun(
                shard=shard,
                sources=sources,
                target=target,
                rewriter=rewriter,
                confirming=confirming,
                report=progress or (lambda count: None),
            )
            jobs = [(name, queue.submit(job)) for name, job in run.jobs(works)]
            ends.append(disk.submit(_end, run, jobs, journal))
        survivals = {name: one for end in ends for name, one in end.result().items()}
        for one in syncing:
            one.result()
    copied = sum(part.size_bytes for shard in shards for part in copied_ranges(shard.tensors))
    rows = sum(one.rows for one in survivals.values())
    return Written(
        copied_bytes=copied,
        rewritten_bytes=sum(shard.size_bytes for shard in shards) - copied,
        resumed_bytes=resumed,
        verified_rows=rows,
        survivals=survivals,
    )


def _paths(shards: Sequence[ShardPlan]) -> set[Path]:
    return {tensor.path for shard in shards for tensor in shard.tensors} | {shard.path for shard in shards}


def _opened(path: Path, stack: ExitStack) -> int:
    file = os.open(path, os.O_RDONLY)
    stack.callback(os.close, file)
    return file


@dataclass(frozen=True, slots=True, kw_only=True)
class _ShardRun:
    """The jobs of one shard. The last job of a tensor starts its confirmation and returns the future result."""

    shard: ShardPlan
    sources: dict[Path, int]
    target: OutputFile
    rewriter: Rewriter
    confirming: ThreadPoolExecutor
    report: Progress

    def jobs(self, works: Iterator[TensorWork]) -> Iterator[tuple[str, Job]]:
        """Yields (tensor, job); takes this shard's tensors from `works`, where they come next."""
        source = self.sources[self.shard.path]
        cloned = self.target.fresh and not self.shard.rewritten and clone_file(source, self.target.file)
        if self.target.fresh and not cloned:
            os.ftruncate(self.target.file, self.shard.size_bytes)
        yield "", self._head
        for part in copied_ranges(self.shard.tensors):
            for piece in pieces(part):
                yield "", (lambda piece=piece: self._copied(piece, cloned))
        for tensor in self.shard.tensors:
            if not tensor.copied:
                yield from self._rewriting(next(works))

    def _head(self) -> None:
        if self.target.fresh:
            write_all(self.target.file, memoryview(self.shard.head), 0)
        self.report(len(self.shard.head))

    def _copied(self, part: Range, cloned: bool) -> None:
        """Copies and compares; cloned blocks are identical and need no comparison."""
        source = self.sources[part.path]
        if self.target.fresh and not cloned:
            copy_range(part, source, self.target.file)
        if not cloned and not equal(part, source, self.target.file):
            raise unconfirmed(self.shard.file, f"bytes from {part.target} differ from the base's")
        self.target.cached(part.size_bytes)
        self.report(part.size_bytes)

    def _rewriting(self, work: TensorWork) -> Iterator[tuple[str, Job]]:
        chunks = list(chunks_of(work))
        countdown = _Countdown(len(chunks))
        for chunk in chunks:
            yield work.plan.target.name, (lambda chunk=chunk: self._rewritten(chunk, countdown))

    def _rewritten(self, chunk: Chunk, countdown: _Countdown) -> Future[RoundingLoss] | None:
        source = self.sources[chunk.work.plan.path]
        if self.target.fresh:
            out_MN = self.rewriter.computed(chunk, source)
            self.target.write(tensor_bytes(out_MN), chunk.offset, out_MN.data_ptr())
        self.report(chunk.size_bytes)
        if not countdown.last():
            return None
        chunk.work.rights.clear()
        return self.confirming.submit(confirm, chunk.work, source, self.target.file, self.rewriter.rounding)


def _end(run: _ShardRun, jobs: Jobs, journal: Journal) -> dict[str, RoundingLoss]:
    """Waits for a shard's jobs, then verifies, syncs and records it."""
    survivals = {name: later.result() for name, job in jobs if (later := job.result())}
    path = journal.directory / run.shard.file
    header = read_header(path)
    if [*header.tensors.values()] != [tensor.target for tensor in run.shard.tensors]:
        raise unconfirmed(run.shard.file, "its header is not the planned one")
    if run.target.fresh:
        os.fsync(run.target.file)
        journal.finish(path)
    return survivals


class _Queue:
    """Submits jobs to the pool, with at most `most` unfinished; each that ends makes room for the next."""

    def __init__(self, pool: ThreadPoolExecutor, most: int) -> None:
        self._pool = pool
        self._room = threading.Semaphore(most)
        self._begun: deque[Future[Future[RoundingLoss] | None]] = deque()
        self._unconfirmed: deque[Future[RoundingLoss]] = deque()

    def submit(self, job: Job) -> Future[Future[RoundingLoss] | None]:
        """Submits a job once there is room. Raises what an earlier job or its confirmation raised."""
        self._room.acquire()
        while self._begun and self._begun[0].done():
            if later := self._begun.popleft().result():
                self._unconfirmed.append(later)
        while self._unconfirmed and (self._unconfirmed[0].done() or len(self._unconfirmed) > _MOST_UNCONFIRMED):
            self._unconfirmed.popleft().result()
        self._begun.append(self._pool.submit(self._run, job))
        return self._begun[-1]

    def _run(self, job: Job) -> Future[RoundingLoss] | None:
        try:
            return job()
        finally:
            self._room.release()


@contextmanager
def _cancelling_pool(workers: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """A pool that, if the block fails, starts no further jobs and waits for the running ones."""
    pool = ThreadPoolExecutor(workers, name)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
