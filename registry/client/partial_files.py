"""A file being downloaded in pieces, which may arrive in any order."""

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
    """Pieces are written at their offsets and recorded in `journal`, so that a later attempt can resume.

    The file is hashed while it arrives: bytes in order immediately, later ones by the thread that fills the gap before
    them, while they are still in the page cache. Thread-safe.

    The size is an untrusted claim: nothing is allocated before `prepare`, which needs `lacking_bytes` of free space.
    """

    def __init__(self, wanted: ManifestFile, target: Path, journal: Path) -> None:
        self.wanted, self.target, self.journal = wanted, target, journal
        self.count = max(1, -(-wanted.size_bytes // PIECE_BYTES))
        self._marking, self._hashing = Lock(), Lock()
        self._begin(self._resumable())

    def _begin(self, done: set[int]) -> None:
        self.done, self.resumed = done, bool(done)
        self._hashed_bytes, self._judged, self._digest = 0, False, hashlib.sha256()

    def _resumable(self) -> set[int]:
        """The pieces of an earlier attempt. A file of one piece has no journal; its length shows if it is complete."""
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
        """Disk space still needed. A partial file has holes where pieces are missing."""
        allocated = self.target.stat().st_blocks * _UNIX_BLOCK_BYTES if self.target.exists() else 0
        return max(0, self.wanted.size_bytes - allocated)

    @property
    def done_bytes(self) -> int:
        return sum(self.span(number)[1] for number in self.done)

    def span(self, number: int) -> tuple[int, int]:
        """Start and length of a piece, in bytes."""
        start = number * PIECE_BYTES
        return start, min(PIECE_BYTES, self.wanted.size_bytes - start)

    def prepare(self) -> None:
        """Allocates the file for the missing pieces; replaces it if no piece is done."""
        self.target.parent.mkdir(parents=True, exist_ok=True)
        if self.done:
            return
        self.journal.unlink(missing_ok=True)
        self.target.unlink(missing_ok=True)  # never overwritten in place: it may be a hard link
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
        """Notes a block just written; hashes it immediately if it is next in order."""
        if start == self._hashed_bytes and self._hashing.acquire(blocking=False):
            try:
                if start == self._hashed_bytes:
                    self._hash([block])
            finally:
                self._hashing.release()

    def arrived(self, number: int) -> bool | None:
        """Records a piece. Returns whether the file is valid to the caller that completes it, None to all others."""
        with self._marking:
            if self.count > 1:
                with self.journal.open("a") as journal:
                    journal.write(f"{number}\n")
            self.done.add(number)
        return self.verdict()

    def verdict(self) -> bool | None:
        """Hashes what has arrived in order. Returns whether the complete file has the right digest, to one caller only;
        None while bytes are missing."""
        while not self._judged and self._next in self.done and self._hashing.acquire(blocking=False):
            try:
                if not self._judged and self._next in self.done:
                    start, length = self.span(self._next)
                    self._hash(blocks(self.target, self._hashed_bytes, start + length - self._hashed_bytes))
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
        """Starts over: an earlier attempt's data does not match its journal."""
        self.journal.unlink(missing_ok=True)
        self._begin(set())


def blocks(path: Path, start: int, size_bytes: int) -> Iterator[bytes]:
    """A part of a file, block by block; less if the file ends before."""
    with path.open("rb") as file:
        file.seek(start)
        while size_bytes and (block := file.read(min(size_bytes, _BLOCK_BYTES))):
            yield block
            size_bytes -= len(block)
