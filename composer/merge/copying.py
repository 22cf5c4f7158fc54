"""Byte ranges that are the same in the base and the output: cloned or copied by the kernel, and compared."""

import errno
import fcntl
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from composer.formats.checkpoints.files import StoredFile, read_all
from composer.merge.chunks import TensorPlan
from composer.merge.io.source import write_all

_COPY_BYTES = 8 << 20  # large ranges are split, so that threads share them and compare them while cached
_COMPARE_BYTES = 256 << 10
_CLONE = 0x40049409  # FICLONE of linux/fs.h
_NO_KERNEL_COPY = frozenset({
    errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF, errno.ENOTTY,
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class CopiedRange:
    """Bytes that are the same in the base and the output."""

    file: StoredFile
    source: int
    target: int
    size_bytes: int

    def joined(self, after: "CopiedRange") -> "CopiedRange | None":
        """Both as one range, if `after` follows in the base and the output."""
        follows = (self.file, self.source + self.size_bytes, self.target + self.size_bytes)
        if follows != (after.file, after.source, after.target):
            return None
        return replace(self, size_bytes=self.size_bytes + after.size_bytes)


def clone_file(source: int, target: int) -> bool:
    """Makes the empty file `target` share the blocks of `source`. False if the file system does not support it.

    A block is copied when either file is written to (btrfs, XFS). A hard link would not do: an in-place edit of the
    base would also change the output.
    """
    try:
        fcntl.ioctl(target, _CLONE, source)
    except OSError as error:
        if error.errno not in _NO_KERNEL_COPY:
            raise
        return False
    return True


def copied_ranges(tensors: Iterable[TensorPlan]) -> list[CopiedRange]:
    """The ranges of an output shard's unchanged tensors, with neighbours joined; one range if nothing changes."""
    ranges: list[CopiedRange] = []
    for tensor in tensors:
        part = CopiedRange(tensor.file, tensor.source.begin, tensor.target.begin, tensor.target.size_bytes)
        if tensor.copied and part.size_bytes:
            joined = ranges[-1].joined(part) if ranges else None
            ranges[-1 if joined else len(ranges) :] = [joined or part]
    return ranges


def pieces(part: CopiedRange) -> Iterator[CopiedRange]:
    """The range in pieces of at most _COPY_BYTES."""
    for done in range(0, part.size_bytes, _COPY_BYTES):
        size = min(_COPY_BYTES, part.size_bytes - done)
        yield CopiedRange(part.file, part.source + done, part.target + done, size)


def copy_range(part: CopiedRange, source: int, target: int) -> None:
    """Copies inside the kernel, or through user space if the file system does not support that."""
    done = 0
    while done < part.size_bytes:
        try:
            count = os.copy_file_range(source, target, part.size_bytes - done, part.source + done, part.target + done)
        except OSError as error:
            if error.errno not in _NO_KERNEL_COPY:
                raise
            count = 0
        if count == 0:  # not supported here, or the source became shorter: reading shows which
            _copy_plainly(part, done, source, target)
            return
        done += count


def _copy_plainly(part: CopiedRange, done: int, source: int, target: int) -> None:
    buffer = memoryview(bytearray(_COMPARE_BYTES))
    while done < part.size_bytes:
        block = buffer[: part.size_bytes - done]
        read_all(source, block, part.source + done, part.file.name)
        write_all(target, block, part.target + done)
        done += block.nbytes


def equal(part: CopiedRange, source: int, target: int) -> bool:
    """Whether the range has the same bytes in both files."""
    # Compared as 64-bit words, eight times as fast as bytes. After a short last block, the buffers hold the previous
    # block's bytes, which were equal.
    words = -(-min(_COMPARE_BYTES, part.size_bytes) // 8)
    ours, theirs = np.zeros(words, np.uint64), np.zeros(words, np.uint64)
    for done in range(0, part.size_bytes, _COMPARE_BYTES):
        size = min(_COMPARE_BYTES, part.size_bytes - done)
        read_all(source, ours.view(np.uint8).data[:size], part.source + done, part.file.name)
        read_all(target, theirs.view(np.uint8).data[:size], part.target + done, "output")
        if not np.array_equal(ours, theirs):
            return False
    return True
