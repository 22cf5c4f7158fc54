"""An output file written by many threads, past the page cache if the file system allows it (O_DIRECT).

A merge writes each byte once and never reads most of them again. The page cache would cost a copy of every byte, pages
to hold them (which evict the base being read), and a later write to disk by the cores that compute. A direct write
hands the computed bytes to the disk. It must begin and end at a disk block, in the file and in memory, so a chunk's
partial first and last blocks go through the page cache.
"""

import errno
import os
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from composer.merge.io.source import write_all

BLOCK_BYTES = 4096  # enough for common disks and file systems; others are written through the page cache
_SYNC_BYTES = 64 << 20
_NO_DIRECT = frozenset({errno.EINVAL, errno.EOPNOTSUPP})
_O_DIRECT = getattr(os, "O_DIRECT", 0)


@dataclass(kw_only=True)
class OutputFile:
    """An output file. `fresh`: written now; otherwise an earlier run wrote it, and it is only verified.

    `direct` is the same file opened for writes past the page cache, or None. `sync` starts a sync to disk.
    """

    file: int
    direct: int | None
    fresh: bool
    sync: Callable[[int], object]
    unsynced: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def opened(cls, path: Path, fresh: bool, sync: Callable[[int], object], stack: ExitStack) -> "OutputFile":
        """Opens the file. Raises FileExistsError if a fresh one already exists."""
        file = os.open(path, os.O_RDWR | (os.O_CREAT | os.O_EXCL if fresh else 0), 0o644)
        stack.callback(os.close, file)
        direct = _opened_direct(path) if fresh else None
        if direct is not None:
            stack.callback(os.close, direct)
        # Verification reads scattered rows; readahead would fetch unused data.
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
        return cls(file=file, direct=direct, fresh=fresh, sync=sync)

    def write(self, buffer: memoryview, offset: int, address: int) -> None:
        """Writes bytes that lie at `address` in memory."""
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
        """The number of bytes written: all, none if the disk has larger blocks, or some if the kernel stopped."""
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
        """Counts bytes written to the page cache, and starts a sync whenever enough have accumulated."""
        with self.lock:
            self.unsynced += count
            due = self.fresh and self.unsynced >= _SYNC_BYTES
            if due:
                self.unsynced = 0
        if due:
            self.sync(self.file)


def _opened_direct(path: Path) -> int | None:
    """A descriptor for direct writes, or None if the file system has none."""
    if not _O_DIRECT:
        return None
    try:
        return os.open(path, os.O_WRONLY | _O_DIRECT)
    except OSError as error:
        if error.errno not in _NO_DIRECT:
            raise
        return None
