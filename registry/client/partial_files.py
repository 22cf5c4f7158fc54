"""A file on its way to this machine, in pieces that arrive in any order."""

import hashlib
import os
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

from registry.formats.manifest import ManifestFile

PIECE_BYTES = 32 << 20
_BLOCK_BYTES = 1 << 20
_UNIX_BLOCK_BYTES = 512


class PartialFile:
    """Pieces are written to their place and noted in `journal`, for an attempt that goes on after this one died.

    The file is hashed while it arrives: bytes that come in order as they pass, the others by whoever brings what was
    missing before them, when they are in memory still. Methods may be called from several threads.

    The size is somebody's claim: until `prepare`, for which `lacking_bytes` must be free, nothing grows with it.
    """

    def __init__(self, wanted: ManifestFile, target: Path, journal: Path) -> None:
        self.wanted, self.target, self.journal = wanted, target, journal
        self.count = max(1, -(-wanted.size_bytes // PIECE_BYTES))
        self._marking, self._hashing = Lock(), Lock()
        self._begin(self._found())

    def _begin(self, done: set[int]) -> None:
        self.done, self.resumed = done, bool(done)
        self._hashed_bytes, self._judged, self._digest = 0, False, hashlib.sha256()

    def _found(self) -> set[int]:
        """Pieces of an earlier attempt. A file of one piece has no journal: its length says whether it is there."""
        if not self.target.exists() or self.target.stat().st_size != self.wanted.size_bytes:
            return set()
        if self.count == 1:
            return {0}
        noted = self.journal.read_text().split() if self.journal.exists() else []
        return {int(number) for number in noted if number.isdecimal() and int(number) < self.count}

    @property
    def complete(self) -> bool:
        return len(self.done) == self.count

    @property
    def missing(self) -> Iterator[int]:
        return (number for number in range(self.count) if number not in self.done)

    @property
    def lacking_bytes(self) -> int:
        """Of disk; a file that was begun has holes where pieces are missing, and may have parts of them."""
        allocated = self.target.stat().st_blocks * _UNIX_BLOCK_BYTES if self.target.exists() else 0
        return max(0, self.wanted.size_bytes - allocated)

    @property
    def done_bytes(self) -> int:
        return sum(self.span(number)[1] for number in self.done)

    def span(self, number: int) -> tuple[int, int]:
        """Start and length."""
        start = number * PIECE_BYTES
        return start, min(PIECE_BYTES, self.wanted.size_bytes - start)

    def prepare(self) -> None:
        """Makes a place for the pieces that are missing; without any it starts with a new file."""
        self.target.parent.mkdir(parents=True, exist_ok=True)
        if self.done:
            return
        self.journal.unlink(missing_ok=True)
        self.target.unlink(missing_ok=True)  # never written to in place: it may be a link to what others have
        with self.target.open("xb") as file:
            if self.count > 1:
                file.truncate(self.wanted.size_bytes)

    @contextmanager
    def opened(self) -> Generator[int]:
        """A descriptor for `os.pwrite`."""
        descriptor = os.open(self.target, os.O_WRONLY)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def passing(self, start: int, block: bytes) -> None:
        """A part of a piece, just written: hashed at once if it is the next."""
        if start == self._hashed_bytes and self._hashing.acquire(blocking=False):
            try:
                if start == self._hashed_bytes:
                    self._hash([block])
            finally:
                self._hashing.release()

    def arrived(self, number: int) -> bool | None:
        """Whether the file is what it should be, told to the one who completed it; None to everybody else."""
        with self._marking:
            if self.count > 1:
                with self.journal.open("a") as journal:
                    journal.write(f"{number}\n")
            self.done.add(number)
        return self.verdict()

    def verdict(self) -> bool | None:
        while not self._judged and self._next in self.done and self._hashing.acquire(blocking=False):
            try:
                if not self._judged and self._next in self.done:
                    start, length = self.span(self._next)
                    self._hash(_blocks(self.target, self._hashed_bytes, start + length - self._hashed_bytes))
                    shortened = self._hashed_bytes < start + length
                    if shortened or self._hashed_bytes == self.wanted.size_bytes:
                        self._judged = True
                        return self._digest.hexdigest() == self.wanted.sha256
            finally:
                self._hashing.release()
        return None

    @property
    def _next(self) -> int:
        return min(self._hashed_bytes // PIECE_BYTES, self.count - 1)

    def _hash(self, blocks: Iterable[bytes]) -> None:
        for block in blocks:
            self._digest.update(block)
            self._hashed_bytes += len(block)

    def forget(self) -> None:
        """Begins anew: what an earlier attempt left was not what its journal said."""
        self.journal.unlink(missing_ok=True)
        self._begin(set())


def _blocks(path: Path, start: int, size_bytes: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while size_bytes and (block := file.read(min(size_bytes, _BLOCK_BYTES))):
            yield block
            size_bytes -= len(block)
