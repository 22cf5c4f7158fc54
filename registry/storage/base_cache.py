"""Downloaded bases: complete directories, removed when others need the space.

A process holds a shared lock on each entry that it uses. An entry is removed only under an exclusive lock, and is
renamed first. The kernel releases the locks of a process that dies.
"""

import fcntl
import os
import secrets
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path


class BaseCache:
    """The entries two levels below `directory`, by address and content. Threads may share it.

    `at_most_bytes` bounds their total size; without it, the disk does. Entries in use stay even beyond that.
    """

    def __init__(self, directory: Path, at_most_bytes: int | None) -> None:
        self.directory, self._at_most_bytes = directory, at_most_bytes
        self._used: dict[Path, int] = {}
        self._lock = threading.Lock()

    def use(self, entry: Path) -> bool:
        """Marks the entry as used until `release`, and as the one used last. Returns whether it exists."""
        with self._lock:
            if entry not in self._used and (handle := _held(entry)) is not None:
                self._used[entry] = handle
            if entry in self._used:
                os.utime(entry)
            return entry in self._used

    def discard(self, entry: Path) -> None:
        """Stops using an entry, and removes it unless another process uses it. Does nothing for other directories."""
        with self._lock:
            handle = self._used.pop(entry, None)
        if handle is not None:
            os.close(handle)
            remove_unused(entry)

    def release(self) -> None:
        """Stops using all entries."""
        with self._lock:
            for handle in self._used.values():
                os.close(handle)
            self._used = {}

    def make_room(self, size_bytes: int) -> None:
        """Removes unused entries, least recently used first, until an entry of this size fits."""
        sizes = {entry: _size(entry) for entry in self._entries()}
        for entry in sorted(sizes, key=_used_at):
            if self._has_room(sum(sizes.values()), size_bytes):
                return
            if remove_unused(entry):
                del sizes[entry]

    def _has_room(self, kept_bytes: int, size_bytes: int) -> bool:
        within = self._at_most_bytes is None or kept_bytes + size_bytes <= self._at_most_bytes
        return within and shutil.disk_usage(self.directory).free >= size_bytes

    def _entries(self) -> Iterator[Path]:
        """All entries, unfinished and half-removed ones included."""
        return (path for path in self.directory.glob("*/*") if path.is_dir() and not path.is_symlink())


def remove_unused(entry: Path) -> bool:
    """Removes a directory unless a process uses or writes it. Returns whether it is gone."""
    try:
        handle = os.open(entry, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is_same(handle, entry):
            return False
        gone = entry.with_name(f"{entry.name}.removed-{secrets.token_hex(4)}")
        entry.rename(gone)  # a half-removed entry must not look complete
        shutil.rmtree(gone, ignore_errors=True)
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
    return True


def _held(entry: Path) -> int | None:
    """A descriptor of the directory with a shared lock; None if it is not there."""
    while True:
        try:
            handle = os.open(entry, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            return None
        fcntl.flock(handle, fcntl.LOCK_SH)
        if _is_same(handle, entry):
            return handle
        os.close(handle)  # it was removed meanwhile, and may be there again


def _is_same(handle: int, entry: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), entry.stat())
    except FileNotFoundError:
        return False


def _size(entry: Path) -> int:
    try:
        return sum(file.stat().st_size for file in entry.iterdir())
    except FileNotFoundError:  # another process has just removed it
        return 0


def _used_at(entry: Path) -> float:
    try:
        return entry.stat().st_mtime
    except FileNotFoundError:
        return 0.0
