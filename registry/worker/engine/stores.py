"""The interfaces through which units use the blob store and bases, and their implementation with credentials."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from composer.formats.checkpoints.checkpoint import Checkpoint
from composer.formats.checkpoints.files import StoredFile
from composer.formats.checkpoints.hashing import hash_file
from registry.formats.references import Digest
from registry.storage.blobs import BlobStore, BlobWriter, Reader


class UnitWriter(Protocol):
    """Writes a file that becomes a blob. Not thread-safe."""

    @property
    def copied_bytes(self) -> int:
        """The number of bytes that the store copied on its side; known after `finish`."""
        ...

    def write(self, block: memoryview, source: StoredFile | None = None, offset: int = 0) -> None:
        """Appends bytes, as `BlobWriter.write` does."""
        ...

    def finish(self) -> Digest:
        """Stores what was written, and returns its digest."""
        ...

    def abort(self) -> None:
        """Removes what was written."""
        ...


class UnitStore(Protocol):
    """The part of a blob store that units use. Errors are those of `BlobStore`."""

    def size_of(self, sha256: Digest) -> int | None:
        """The size of a blob in bytes; None if it is absent."""
        ...

    def open(self, sha256: Digest, /) -> Reader:
        """Opens a blob."""
        ...

    def put(self, source: Path) -> Digest:
        """Stores a file that a unit made, and may remove the file. Returns its digest."""
        ...

    def begin_write(self, size_bytes: int) -> UnitWriter:
        """Begins writing a file of that size."""
        ...


class UnitDocuments(Protocol):
    """The documents that the units of a step share."""

    def read(self, key: str) -> bytes | None:
        """Reads the document under the key; None if there is none."""
        ...


class UnitBases(Protocol):
    """The bases that a unit can open; see `registry.transfer.bases.Bases`."""

    def open(
        self, digest: str, locations: Sequence[str], size_bytes: int, check: Callable[[], None], /
    ) -> Checkpoint: ...

    def open_verified(
        self, digest: str, locations: Sequence[str], size_bytes: int, check: Callable[[int], None], /
    ) -> Checkpoint: ...

    def open_in_bucket(self, location: str, directory: Path, /) -> Checkpoint: ...

    def release(self) -> None: ...


class DirectStore:
    """Direct access to the store, for a process with credentials."""

    def __init__(self, store: BlobStore) -> None:
        self._store = store

    def size_of(self, sha256: Digest) -> int | None:
        stat = self._store.stat(sha256)
        return stat.size_bytes if stat else None

    def open(self, sha256: Digest, /) -> Reader:
        return self._store.open(sha256)

    def put(self, source: Path) -> Digest:
        digest = Digest(hash_file(source))
        self._store.put(digest, source, move=True)
        return digest

    def begin_write(self, size_bytes: int) -> "HashingWriter":
        return HashingWriter(self._store.begin_write(size_bytes))


class HashingWriter:
    """A writer that computes the digest of what it writes."""

    def __init__(self, writer: BlobWriter) -> None:
        self._writer, self._digest = writer, hashlib.sha256()

    @property
    def copied_bytes(self) -> int:
        return self._writer.copied_bytes

    def write(self, block: memoryview, source: StoredFile | None = None, offset: int = 0) -> None:
        self._digest.update(block)
        self._writer.write(block, source, offset)

    def finish(self) -> Digest:
        digest = Digest(self._digest.hexdigest())
        self._writer.finish(digest)
        return digest

    def abort(self) -> None:
        self._writer.abort()
