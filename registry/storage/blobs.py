"""Content-addressed bytes: what every store promises, and the one function that makes keys."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from registry.formats.references import Digest


def blob_key(sha256: Digest) -> str:
    return f"blobs/sha256/{sha256[:2]}/{sha256}"


@dataclass(frozen=True, slots=True)
class BlobStat:
    sha256: Digest
    size_bytes: int
    written_at: datetime


class Reader(Protocol):
    """The part of a binary file that readers of a blob use; closed at the end of its `with`."""

    def read(self, size: int = -1, /) -> bytes: ...
    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class IncomingUpload:
    """Bytes that a client announced: `upload_id` is its own, the rest is what they claim to be.

    `multipart_id` and `part_bytes` are set where they come in parts of that size, the last one shorter.
    """

    upload_id: str
    sha256: Digest
    size_bytes: int
    multipart_id: str | None = None
    part_bytes: int | None = None

    @property
    def part_sizes(self) -> list[int]:
        full_parts, rest = divmod(self.size_bytes, self.part_bytes or self.size_bytes or 1)
        return [self.part_bytes or self.size_bytes] * full_parts + [rest] * bool(rest)


@dataclass(frozen=True, slots=True)
class Put:
    """A request that a client may make of the store until it expires; `headers` must be sent as they are."""

    url: str
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Part:
    """Parts count from 1."""

    number: int
    size_bytes: int
    present: bool


class DirectUploads(Protocol):
    """The side of a store that clients send to directly. What has arrived is no blob before `finish` has checked it.

    Only who sends the bytes can finish an arrival: another one of the same digest does not help it.
    """

    def part_bytes(self, size_bytes: int) -> int | None:
        """In parts of which size a file of that size is sent; None for one sent whole."""
        ...

    def begin(self, arrival: IncomingUpload) -> str:
        """The `multipart_id` of a file that comes in parts."""
        ...

    def sign_object(self, arrival: IncomingUpload, expires_s: int, *, sent_before: bool, known: bool) -> Put | None:
        """How to send the file; None when it has arrived, which is only looked at if it was `sent_before`.

        `known` says that there is such a blob already, which must not be touched by bytes that nobody has checked.
        """
        ...

    def parts(self, arrival: IncomingUpload) -> list[Part] | None:
        """All of them; [] once they are joined; None when the store has forgotten the upload: begin again."""
        ...

    def sign_part(self, arrival: IncomingUpload, number: int, sha256: Digest, expires_s: int) -> Put:
        """How to send that part. A store that can refuses bytes of another sha256."""
        ...

    def finish(self, arrival: IncomingUpload) -> BlobStat:
        """Makes a blob of what arrived, having checked its size and its digest. Twice is once.

        Raises Conflict when something is missing still, and Invalid when the bytes are not what they claim to be,
        which leaves nothing of them.
        """
        ...

    def abandon(self, arrival: IncomingUpload) -> None:
        """The parts that came for this `multipart_id` are gone, and nothing else of the upload."""
        ...

    def discard(self, arrival: IncomingUpload) -> None:
        """What arrived is gone, unless it has become a blob. Discarding what never came is fine."""
        ...


class BlobStore(Protocol):
    """Promises. Errors: `NotFound` for bytes that are not there, `Unavailable` when the store is away or full."""

    @property
    def arrivals(self) -> DirectUploads | None:
        """None where bytes come through the API, which then checks them and calls `put`."""
        ...

    def stat(self, sha256: Digest) -> BlobStat | None:
        """None when the blob is absent. What is present is whole: a put that died left nothing under the key."""
        ...

    def open(self, sha256: Digest, start: int = 0, length: int | None = None) -> Reader:
        """Bytes from `start`, at most `length` of them. Reading while somebody deletes still yields the right bytes."""
        ...

    def put(self, sha256: Digest, source: Path, *, move: bool = False) -> BlobStat:
        """Takes a file that the caller has verified. Twice is once. With `move` the file may be gone afterwards."""
        ...

    def url(self, sha256: Digest, expires_s: int) -> str | None:
        """A link that a client may read from directly, or None where there is no such thing."""
        ...

    def delete(self, sha256: Digest) -> None:
        """Afterwards the blob is absent. Deleting what is absent is fine."""
        ...

    def iterate(self) -> Iterator[BlobStat]:
        """Every blob present from before the call until its end, in any order."""
        ...

    def sweep(self, before: datetime, keep: Collection[str]) -> int:
        """Removes what began to arrive before that moment and is no blob, but for the upload ids to keep; how many."""
        ...
