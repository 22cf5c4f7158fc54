"""An output file that is written by many threads, past the page cache where the file system can (O_DIRECT).

A merge writes each byte once and never reads most of them again. Through the page cache that costs a copy of every
byte, pages to hold them (which push the base out that is being read), and a later write to the disk by the same cores
that compute; a direct write hands the computed bytes to the disk. It has to begin and end at a block of the disk, in
the file and in memory, so that what a chunk has of its first and last block goes through the page cache.
"""

import errno
import os
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from composer.merge.io.source import write_all

BLOCK_BYTES = 4096  # no disk or file system in use asks for more; one that does is written through the page cache
_SYNC_BYTES = 64 << 20
_NO_DIRECT = frozenset({errno.EINVAL, errno.EOPNOTSUPP})
_O_DIRECT = getattr(os, "O_DIRECT", 0)


@dataclass
class OutputFile:
    """An output file: `fresh` says that it is written now; otherwise an earlier run did, and it is only verified.

    `direct` is the same file, opened to be written past the page cache, or None. `sync` has a file taken to the disk.
    """

    file: int
    direct: int | None
    fresh: bool
    sync: Callable[[int], object]
    unsynced: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def opened(cls, path: Path, fresh: bool, sync: Callable[[int], object], stack: ExitStack) -> "OutputFile":
        """Raises FileExistsError for a fresh one that is there."""
        file = os.open(path, os.O_RDWR | (os.O_CREAT | os.O_EXCL if fresh else 0), 0o644)
        stack.callback(os.close, file)
        direct = _opened_direct(path) if fresh else None
        if direct is not None:
            stack.callback(os.close, direct)
        # What is read back are a few rows here and there; reading ahead would only fetch what is not looked at.
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
        return cls(file, direct, fresh, sync)

    def write(self, buffer: memoryview, offset: int, address: int) -> None:
        """Write bytes, which lie at `address` in memory."""
        size = buffer.nbytes
        first = min(-offset % BLOCK_BYTES, size)
        last = first + (size - first) // BLOCK_BYTES * BLOCK_BYTES
        if self.direct is None or first == last or (address + first) % BLOCK_BYTES:
            first = last = size
        write_all(self.file, buffer[:first], offset)
        direct = self._written_directly(buffer[first:last], offset + first)
        write_all(self.file, buffer[first + direct :], offset + first + direct)
        self.cached(size - direct)

    def _written_directly(self, blocks: memoryview, offset: int) -> int:
        """How many of the bytes were: all, none where the disk has larger blocks, some where the kernel stopped."""
        if self.direct is None or not blocks.nbytes:
            return 0
        try:
            return os.pwrite(self.direct, blocks, offset)
        except OSError as error:
            if error.errno not in _NO_DIRECT:
                raise
            self.direct = None
            return 0

    def cached(self, count: int) -> None:
        """`count` bytes were written to the page cache: taken to the disk each time they are enough to be worth it."""
        with self.lock:
            self.unsynced += count
            due = self.fresh and self.unsynced >= _SYNC_BYTES
            if due:
                self.unsynced = 0
        if due:
            self.sync(self.file)


def _opened_direct(path: Path) -> int | None:
    """None where the file system has no direct writes."""
    if not _O_DIRECT:
        return None
    try:
        return os.open(path, os.O_WRONLY | _O_DIRECT)
    except OSError as error:
        if error.errno not in _NO_DIRECT:
            raise
        return None
