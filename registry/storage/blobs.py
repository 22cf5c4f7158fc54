"""Content-addressed bytes: the contract of every store, and the function that makes keys."""

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from composer.formats.checkpoints.files import StoredFile
from registry.errors import NotFound
from registry.formats.references import Digest

WORK = "work/"
"""The prefix of results of units of work."""
MAX_RESULT_BYTES = 64 << 20
"""Limit on the size of a result: our own code writes small ones, but a store may hold anything."""


class UnitResults(Protocol):
    """Small JSON documents in a store's directory or bucket: results of units of work, by a key of everything that
    determines them, so that no other process repeats finished work. The bytes that a unit makes are blobs.

    Errors: Unavailable if the store cannot be reached or is full."""

    def read(self, key: str) -> bytes | None:
        """The result under the key, up to MAX_RESULT_BYTES; None if absent."""
        ...

    def write(self, key: str, content: bytes) -> None:
        """Keeps a result, completely or not at all. The last of several writers wins: their work was the same."""
        ...

    def delete(self, key: str) -> None:
        """Removes a result, if it exists."""
        ...

    def sweep(self, before: datetime) -> int:
        """Removes the results that were written before that time. Returns their number."""
        ...


def blob_key(sha256: Digest) -> str:
    """The key of a blob in every store."""
    return f"blobs/sha256/{sha256[:2]}/{sha256}"


def blob_missing(subject: str) -> NotFound:
    """The error for bytes that a store should have."""
    return NotFound(
        "blob_missing",
        f"The store has no blob {subject}.",
        subject=subject,
        next_step="Push the file again, or restore the blob from a backup.",
    )


@dataclass(frozen=True, slots=True)
class BlobStat:
    """A stored blob: its digest, its size and when it was written."""

    sha256: Digest
    size_bytes: int
    written_at: datetime


class Reader(Protocol):
    """The part of a binary file's interface that readers of a blob use; closed at the end of its `with`."""

    def read(self, size: int = -1, /) -> bytes: ...
    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        self.close()


class OpensBlobs(Protocol):
    """The part of a store that reads."""

    def open(self, sha256: Digest, /) -> Reader:
        """Opens a blob. Raises NotFound if it is missing."""
        ...


@dataclass(frozen=True, slots=True)
class IncomingUpload:
    """Bytes that a client announced. `upload_id` is unique to the upload; the client claims the rest. `multipart_id`
    and `part_bytes` are set if they come in parts of that size, the last one shorter. `unchecked` bytes are sent
    without headers, so the store cannot compare a digest: they go to a location of their own, and are hashed.
    """

    upload_id: str
    sha256: Digest
    size_bytes: int
    multipart_id: str | None = None
    part_bytes: int | None = None
    unchecked: bool = False

    @property
    def part_sizes(self) -> list[int]:
        """The size of each part in bytes: all equal except a shorter last one."""
        full_parts, rest = divmod(self.size_bytes, self.part_bytes or self.size_bytes or 1)
        return [self.part_bytes or self.size_bytes] * full_parts + [rest] * bool(rest)


@dataclass(frozen=True, slots=True)
class Put:
    """A request that a client may send to the store until it expires; `headers` must be sent unchanged."""

    url: str
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Part:
    """A part of an upload; numbers start at 1."""

    number: int
    size_bytes: int
    present: bool


class DirectUploads(Protocol):
    """The part of a store that clients send to directly.

    Incoming bytes are not a blob before `finish` has checked them. Only the sender can finish an upload: another upload
    of the same digest does not help it.
    """

    def part_bytes(self, size_bytes: int) -> int | None:
        """The part size for a file of that size; None if it is sent in one request."""
        ...

    def begin(self, arrival: IncomingUpload) -> str:
        """Begins a file in parts, and returns its `multipart_id`."""
        ...

    def sign_object(self, arrival: IncomingUpload, expires_s: int, *, sent_before: bool, known: bool) -> Put | None:
        """The request that sends the file; None if it has arrived, which is checked only if it was `sent_before`.
        `known` means that such a blob exists already, which unchecked bytes must not touch."""
        ...

    def parts(self, arrival: IncomingUpload) -> list[Part] | None:
        """All parts; [] once they are joined; None if the store has forgotten the upload and it must begin again."""
        ...

    def sign_part(self, arrival: IncomingUpload, number: int, sha256: Digest, expires_s: int) -> Put:
        """The request that sends that part. If the store can, it refuses bytes of another sha256."""
        ...

    def finish(self, arrival: IncomingUpload) -> BlobStat:
        """Checks the size and digest of the received bytes, and makes a blob of them. May be repeated. Raises Conflict
        if
        something is still missing, and Invalid if the bytes are not those announced, which are then removed."""
        ...

    def abandon(self, arrival: IncomingUpload) -> None:
        """Removes the parts received for this `multipart_id`, and nothing else of the upload."""
        ...

    def discard(self, arrival: IncomingUpload) -> None:
        """Removes the received bytes, unless they have become a blob. May be called if nothing was received."""
        ...


class BlobWriter(Protocol):
    """Writes a file whose digest is known only at its end, when it becomes a blob. For one thread."""

    @property
    def copied_bytes(self) -> int:
        """The number of bytes that the store copied by itself; known after `finish`."""
        ...

    def write(self, block: memoryview, source: StoredFile | None = None, offset: int = 0) -> None:
        """Writes the next bytes. A `source` has the same bytes at `offset`, so a store may copy them from there.
        Raises RefusedOutput if the source has changed since it was opened."""
        ...

    def finish(self, sha256: Digest) -> BlobStat:
        """Stores the written bytes as the blob of this digest, which the caller has computed."""
        ...

    def abort(self) -> None:
        """Removes the written bytes. If a writer is neither finished nor aborted, `sweep` removes them later."""
        ...


class BlobStore(Protocol):
    """The contract of a store. Errors: `NotFound` for missing bytes, `Unavailable` if the store cannot be reached or is
    full.
    """

    @property
    def arrivals(self) -> DirectUploads | None:
        """None if bytes come through the API, which checks them and calls `put`."""
        ...

    def stat(self, sha256: Digest) -> BlobStat | None:
        """None if the blob is absent. A present blob is complete: a `put` that died leaves nothing under the key."""
        ...

    def open(self, sha256: Digest, start: int = 0, length: int | None = None) -> Reader:
        """Opens the bytes from `start`, at most `length` of them. A reader gets the right bytes even if the blob is
        deleted meanwhile."""
        ...

    def put(self, sha256: Digest, source: Path, *, move: bool = False) -> BlobStat:
        """Stores a file that the caller has verified. May be repeated. With `move` the file may be gone afterwards."""
        ...

    def begin_write(self, size_bytes: int) -> BlobWriter:
        """Begins a file of that size whose digest is not known yet."""
        ...

    def url(self, sha256: Digest, expires_s: int, disposition: str | None = None) -> str | None:
        """An address from which a client can download the blob, or None if there is none. `disposition` becomes the
        download's Content-Disposition."""
        ...

    def delete(self, sha256: Digest) -> None:
        """Deletes the blob, if it exists."""
        ...

    def iterate(self) -> Iterator[BlobStat]:
        """Yields every blob that exists from before the call until its end, in any order."""
        ...

    def unit_results(self) -> UnitResults:
        """The results of units of work, beside the blobs."""
        ...

    def sweep(self, before: datetime, keep: Collection[str]) -> int:
        """Removes uploads that began before that time and are not blobs, except the upload ids in `keep`. Returns their
        number."""
        ...


# Caches for half a minute that a store has a blob, for many clients that download one release at the same time.

REMEMBERED_S = 30.0
_REMEMBERED = 10_000


class RecentStats:
    """A cache of a store's answers about existing blobs. `clock` counts seconds.

    A blob that is lost meanwhile is noticed REMEMBERED_S later; until then its address leads to the store's own 404.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: dict[Digest, tuple[float, BlobStat]] = {}

    def stat(self, store: BlobStore, sha256: Digest) -> BlobStat | None:
        """Caches `store.stat`. One caller renews an old answer, since a busy store may take longer than clients wait.
        Absent blobs are not remembered."""
        asked_at, known = self._known.get(sha256, (0.0, None))
        if known is not None:
            if self._clock() - asked_at < REMEMBERED_S:
                return known
            self._known[sha256] = self._clock(), known  # for the others meanwhile
        stat = store.stat(sha256)
        if len(self._known) >= _REMEMBERED:
            self._known = {}
        if stat is None:
            self._known.pop(sha256, None)
        else:
            self._known[sha256] = self._clock(), stat
        return stat
