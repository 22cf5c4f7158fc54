"""Run a merge plan: the kernel copies what no adapter touches, threads rewrite the rest, and all of it is verified."""

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from composer.chunks import Chunk, Rewriter, TensorPlan, chunks_of, confirm, read_all, write_all
from composer.errors import RefusedOutput
from composer.formats.header import read_header
from composer.tensors import torch_threads

_COPY_BYTES = 32 << 20  # a large range is split, so that several threads share it
_COMPARE_BYTES = 1 << 20
_NO_KERNEL_COPY = frozenset({errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF})

Progress = Callable[[int], None]
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
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


@dataclass(frozen=True, slots=True)
class Written:
    copied_bytes: int
    rewritten_bytes: int
    verified_rows: int


@dataclass(frozen=True, slots=True)
class _Range:
    """Bytes that are the same in the base and the output."""

    path: Path
    source: int
    target: int
    size_bytes: int

    def joined(self, after: "_Range") -> "_Range | None":
        """Both as one range, when the other follows on both sides."""
        follows = (self.path, self.source + self.size_bytes, self.target + self.size_bytes)
        if follows != (after.path, after.source, after.target):
            return None
        return replace(self, size_bytes=self.size_bytes + after.size_bytes)


@dataclass(frozen=True, slots=True)
class _Files:
    """Open files by path: base shards to read, output shards to read and write."""

    sources: dict[Path, int]
    targets: dict[str, int]


def write_shards(
    shards: Sequence[ShardPlan], directory: Path, device: torch.device, progress: Progress | None
) -> Written:
    """Write all shards into `directory`, synced and verified. Raises what a job raises, once the running ones end."""
    report = progress or (lambda count: None)
    rewriter = Rewriter(device)
    with ExitStack() as stack:
        files = _open(shards, directory, stack)
        # The pool is the parallelism: chunks are too small to share.
        stack.enter_context(torch_threads(1))
        pool = stack.enter_context(_cancelling_pool(max(2, os.cpu_count() or 1), "merge"))
        # Syncing waits for the disk, so it has threads of its own and hides behind the rest.
        disk = stack.enter_context(_cancelling_pool(4, "sync"))
        writing = [_submit_writes(shard, files, pool, rewriter, report) for shard in shards]
        checking: list[Future[int]] = []
        syncing: list[Future[None]] = []
        for shard, jobs in zip(shards, writing, strict=True):
            _results(jobs)
            syncing.append(disk.submit(os.fsync, files.targets[shard.file]))
            checking += _submit_checks(shard, directory, files, pool)
        verified_rows = sum(_results(checking))
        _results(syncing)
    copied = sum(part.size_bytes for shard in shards for part in _copied_ranges(shard))
    return Written(copied, sum(shard.size_bytes for shard in shards) - copied, verified_rows)


def _open(shards: Sequence[ShardPlan], directory: Path, stack: ExitStack) -> _Files:
    def opened(path: Path, flags: int) -> int:
        file = os.open(path, flags, 0o644)
        stack.callback(os.close, file)
        return file

    sources = {
        path: opened(path, os.O_RDONLY) for path in {tensor.path for shard in shards for tensor in shard.tensors}
    }
    targets = {shard.file: opened(directory / shard.file, os.O_RDWR | os.O_CREAT | os.O_EXCL) for shard in shards}
    for shard in shards:
        os.ftruncate(targets[shard.file], shard.size_bytes)
    return _Files(sources, targets)


def _submit_writes(
    shard: ShardPlan, files: _Files, pool: ThreadPoolExecutor, rewriter: Rewriter, report: Progress
) -> list[Future[None]]:
    target = files.targets[shard.file]

    def write_head() -> None:
        write_all(target, memoryview(shard.head), 0)
        report(len(shard.head))

    def rewrite(chunk: Chunk) -> None:
        rewriter.rewrite(chunk, files.sources[chunk.tensor.path], target)
        report(chunk.size_bytes)

    def copy(part: _Range) -> None:
        _copy(part, files.sources[part.path], target)
        report(part.size_bytes)

    jobs = [pool.submit(write_head)]
    for part in _copied_ranges(shard):
        jobs += [pool.submit(copy, piece) for piece in _pieces(part)]
    for tensor in shard.tensors:
        if not tensor.copied:
            jobs += [pool.submit(rewrite, chunk) for chunk in chunks_of(tensor)]
    return jobs


def _submit_checks(shard: ShardPlan, directory: Path, files: _Files, pool: ThreadPoolExecutor) -> list[Future[int]]:
    """Jobs that confirm a written shard; each returns the number of rows it recomputed."""
    target = files.targets[shard.file]

    def layout() -> int:
        header = read_header(directory / shard.file)
        if [*header.tensors.values()] != [tensor.target for tensor in shard.tensors]:
            raise _unconfirmed(shard.file, "its header is not the planned one")
        return 0

    def same(part: _Range) -> int:
        if not _equal(part, files.sources[part.path], target):
            raise _unconfirmed(shard.file, f"bytes from {part.target} differ from the base's")
        return 0

    def recomputed(tensor: TensorPlan) -> int:
        return confirm(tensor, files.sources[tensor.path], target)

    jobs = [pool.submit(layout)]
    jobs += [pool.submit(same, piece) for part in _copied_ranges(shard) for piece in _pieces(part)]
    return jobs + [pool.submit(recomputed, tensor) for tensor in shard.tensors if not tensor.copied]


def _unconfirmed(file: str, why: str) -> RefusedOutput:
    message = f"{file} was not written as planned: {why}."
    return RefusedOutput("verification", message, subject=file, next_step="Check the disk and memory, and try again.")


def _copied_ranges(shard: ShardPlan) -> list[_Range]:
    """The untouched tensors, neighbours joined: a shard that nothing touches is one range."""
    ranges: list[_Range] = []
    for tensor in shard.tensors:
        part = _Range(tensor.path, tensor.source.begin, tensor.target.begin, tensor.target.size_bytes)
        if tensor.copied and part.size_bytes:
            joined = ranges[-1].joined(part) if ranges else None
            ranges[-1 if joined else len(ranges) :] = [joined or part]
    return ranges


def _pieces(part: _Range) -> Iterator[_Range]:
    for done in range(0, part.size_bytes, _COPY_BYTES):
        size = min(_COPY_BYTES, part.size_bytes - done)
        yield _Range(part.path, part.source + done, part.target + done, size)


def _copy(part: _Range, source: int, target: int) -> None:
    """Copy inside the kernel; through user space where the file systems cannot."""
    done = 0
    while done < part.size_bytes:
        try:
            count = os.copy_file_range(source, target, part.size_bytes - done, part.source + done, part.target + done)
        except OSError as error:
            if error.errno not in _NO_KERNEL_COPY:
                raise
            count = 0
        if count == 0:  # not supported here, or the source is shorter than it was: reading tells which
            _copy_plainly(part, done, source, target)
            return
        done += count


def _copy_plainly(part: _Range, done: int, source: int, target: int) -> None:
    buffer = memoryview(bytearray(_COMPARE_BYTES))
    while done < part.size_bytes:
        block = buffer[: part.size_bytes - done]
        read_all(source, block, part.source + done, part.path.name)
        write_all(target, block, part.target + done)
        done += block.nbytes


def _equal(part: _Range, source: int, target: int) -> bool:
    ours, theirs = (np.empty(min(_COMPARE_BYTES, part.size_bytes), dtype=np.uint8) for _ in range(2))
    for done in range(0, part.size_bytes, _COMPARE_BYTES):
        size = min(_COMPARE_BYTES, part.size_bytes - done)
        read_all(source, ours.data[:size], part.source + done, part.path.name)
        read_all(target, theirs.data[:size], part.target + done, "output")
        if not np.array_equal(ours[:size], theirs[:size]):
            return False
    return True


def _results(jobs: Sequence[Future[_Result]]) -> list[_Result]:
    return [job.result() for job in jobs]


@contextmanager
def _cancelling_pool(workers: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """A pool that, when the block fails, starts no further job and waits for those that run."""
    pool = ThreadPoolExecutor(workers, name)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
