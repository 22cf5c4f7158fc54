"""Runs a merge plan: the kernel copies tensors that no adapter touches, threads rewrite the rest, and everything is
verified.

Three stages, each with a bounded number of unfinished jobs, so that memory holds a few chunks:
write    copies a piece and compares it while it is cached, or computes a chunk and writes it; in file order
confirm  reads samples of a rewritten tensor back, once its last chunk is written
sync     takes written data to the disk, and records a shard once all its jobs are done
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType

from composer.deltas.tensors import tensor_bytes, torch_threads
from composer.formats.checkpoints.files import OpenFile, StoredFile, local_file
from composer.formats.checkpoints.header import read_header
from composer.merge.chunks import Chunk, Rewriter, RewriteStats, TensorPlan, TensorWork, chunks_of, prepare
from composer.merge.copying import CopiedRange, clone_file, copied_ranges, copy_range, equal, pieces
from composer.merge.io.journal import ShardJournal
from composer.merge.io.output_file import OutputFile
from composer.merge.io.source import write_all
from composer.merge.rounding_loss import RoundingLoss, confirm, unconfirmed


# A stage of a merge: threads that take jobs in order, with a bounded number of them unfinished.
class Stage:
    """Runs jobs in `threads` threads, at most `most` of them submitted and unfinished. Once a job or the block fails,
    no further ones are started.

    A job may submit to another stage, which must then be opened before this one, so that it ends after it.
    """

    def __init__(self, name: str, threads: int, most: int) -> None:
        self._pool = ThreadPoolExecutor(threads, name)
        self._room = threading.Semaphore(most)
        self._lock = threading.Lock()
        self._begun: deque[Future[None]] = deque()
        self._failed = False

    def __enter__(self) -> "Stage":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def submit(self, job: Callable[[], None]) -> None:
        """Submits a job once there is room. Raises the error of an earlier job."""
        self._room.acquire()
        try:
            with self._lock:
                while self._begun and self._begun[0].done():
                    self._begun[0].result()  # a failed one stays first, so that every later call raises its error
                    self._begun.popleft()
                self._begun.append(self._pool.submit(self._run, job))
        except BaseException:
            self._room.release()
            raise

    def drain(self) -> None:
        """Waits for all jobs. Raises the error of the first failed one."""
        for future in self._begun:
            future.result()

    def _run(self, job: Callable[[], None]) -> None:
        try:
            if not self._failed:
                job()
        except BaseException:
            self._failed = True
            raise
        finally:
            self._room.release()


_MOST_WRITERS = 16  # two per core: one waits for the disk while the other computes; each has 8 MB of buffers
_MOST_UNCONFIRMED = 16  # tensors; the factors of each stay in memory until then

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardPlan:
    """One output file: the base's file of that name, the output's first bytes (length and header) and size, and its
    tensors in file order."""

    file: str
    source: StoredFile
    head: bytes
    size_bytes: int
    tensors: tuple[TensorPlan, ...]

    @property
    def rewritten(self) -> bool:
        """Whether any tensor of the shard changes."""
        return not all(tensor.copied for tensor in self.tensors)


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """`resumed_bytes` belong to shards that an earlier run had finished; `survivals` are by tensor name, and `measured`
    covers every value that was rewritten, in all runs."""

    copied_bytes: int
    rewritten_bytes: int
    resumed_bytes: int
    verified_rows: int
    survivals: dict[str, RoundingLoss]
    measured: RewriteStats


class _Countdown:
    """Detects the end of the last of several jobs, in any thread."""

    def __init__(self, count: int) -> None:
        self._left = count
        self._lock = threading.Lock()

    def more(self) -> None:
        with self._lock:
            self._left += 1

    def last(self) -> bool:
        with self._lock:
            self._left -= 1
            return self._left == 0


def write_shards(
    shards: Sequence[ShardPlan], journal: ShardJournal, rewriter: Rewriter, progress: Progress | None
) -> Written:
    """Writes all shards into the journal's directory, synced and verified; finished ones are only verified.

    Raises what a job raises, once the running ones end.
    """
    survivals: dict[str, RoundingLoss] = {}
    for shard in shards:
        if journal.holds(shard.file):
            rewriter.measured.add(RewriteStats.from_json(journal.measured(shard.file)))
    resumed = sum(shard.size_bytes for shard in shards if journal.holds(shard.file))
    with ExitStack() as stack:
        # Closed after the stages have ended: a closed descriptor may be reused while a job still writes to it.
        files = stack.enter_context(ExitStack())
        # The threads of a stage are the parallelism: chunks are too small to share.
        stack.enter_context(torch_threads(1))
        writers = min(2 * max(2, os.cpu_count() or 1), _MOST_WRITERS)
        sync = stack.enter_context(Stage("sync", threads=4, most=8))
        confirming = stack.enter_context(Stage("confirm", threads=2, most=_MOST_UNCONFIRMED))
        write = stack.enter_context(Stage("write", threads=writers, most=2 * writers))

        def start_sync(file: int) -> None:
            sync.submit(partial(os.fdatasync, file))

        for shard in shards:
            target = OutputFile.opened(journal.directory / shard.file, not journal.holds(shard.file), start_sync, files)
            _ShardRun(
                shard=shard, target=target, rewriter=rewriter, journal=journal, write=write, confirm=confirming,
                sync=sync, report=progress or (lambda count: None), survivals=survivals,
            ).submit()  # fmt: skip
        for stage in (write, confirming, sync):  # each submits to those after it
            stage.drain()
    copied = sum(part.size_bytes for shard in shards for part in copied_ranges(shard.tensors))
    changed = [tensor.target.name for shard in shards for tensor in shard.tensors if not tensor.copied]
    return Written(
        copied_bytes=copied,
        rewritten_bytes=sum(shard.size_bytes for shard in shards) - copied,
        resumed_bytes=resumed,
        verified_rows=sum(loss.rows for loss in survivals.values()),
        survivals={name: survivals[name] for name in changed if name in survivals},
        measured=rewriter.measured,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _ShardRun:
    """The jobs of one shard. The last chunk of a tensor starts its confirmation, and the last job of all starts the
    shard's end."""

    shard: ShardPlan
    target: OutputFile
    rewriter: Rewriter
    journal: ShardJournal
    write: Stage
    confirm: Stage
    sync: Stage
    report: Progress
    survivals: dict[str, RoundingLoss]
    unfinished: _Countdown = field(default_factory=lambda: _Countdown(1))

    def submit(self) -> None:
        source = local_file(self.shard.source).descriptor
        cloned = self.target.fresh and not self.shard.rewritten and clone_file(source, self.target.file)
        if self.target.fresh and not cloned:
            os.ftruncate(self.target.file, self.shard.size_bytes)
        self._start(self.write, self._write_head)
        for part in copied_ranges(self.shard.tensors):
            for piece in pieces(part):
                self._start(self.write, partial(self._copy, piece, cloned))
        for tensor in self.shard.tensors:
            if not tensor.copied:
                chunks = list(chunks_of(prepare(tensor, self.rewriter.device)))
                unwritten = _Countdown(len(chunks))
                for chunk in chunks:
                    self._start(self.write, partial(self._rewrite, chunk, unwritten))
        self._end_job()

    def _start(self, stage: Stage, job: Callable[[], None]) -> None:
        def run() -> None:
            job()
            self._end_job()

        self.unfinished.more()
        stage.submit(run)

    def _end_job(self) -> None:
        if self.unfinished.last():
            self.sync.submit(self._end)

    def _write_head(self) -> None:
        if self.target.fresh:
            write_all(self.target.file, memoryview(self.shard.head), 0)
        self.report(len(self.shard.head))

    def _copy(self, part: CopiedRange, cloned: bool) -> None:
        """Copies and compares; cloned blocks are identical and need no comparison."""
        source = local_file(part.file).descriptor
        if self.target.fresh and not cloned:
            copy_range(part, source, self.target.file)
        if not cloned and not equal(part, source, self.target.file):
            raise unconfirmed(self.shard.file, f"bytes from {part.target} differ from the base's")
        self.target.cached(part.size_bytes)
        self.report(part.size_bytes)

    def _rewrite(self, chunk: Chunk, unwritten: _Countdown) -> None:
        if self.target.fresh:
            out_MN = self.rewriter.computed(chunk, chunk.work.plan.file)
            self.target.write(tensor_bytes(out_MN), chunk.offset, out_MN.data_ptr())
        self.report(chunk.size_bytes)
        if unwritten.last():
            chunk.work.rights.clear()
            self._start(self.confirm, partial(self._confirm, chunk.work))

    def _confirm(self, work: TensorWork) -> None:
        target = OpenFile(self.target.file, self.shard.file)
        self.survivals[work.plan.target.name] = confirm(work, work.plan.file, target, self.rewriter.rounding)

    def _end(self) -> None:
        """Verifies, syncs and records a shard whose jobs are done."""
        path = self.journal.directory / self.shard.file
        if [*read_header(path).tensors.values()] != [tensor.target for tensor in self.shard.tensors]:
            raise unconfirmed(self.shard.file, "its header is not the planned one")
        if self.target.fresh:
            os.fsync(self.target.file)
            own = {tensor.target.name for tensor in self.shard.tensors}
            self.journal.finish(path, self.rewriter.measured.of(own))
