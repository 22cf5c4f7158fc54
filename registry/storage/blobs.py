"""Content-addressed bytes: what every store promises, and the one function that makes keys."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from registry.names import Digest


def blob_key(sha256: Digest) -> str:
    return f"blobs/sha256/{sha256[:2]}/{sha256}"


@dataclass(frozen=True, slots=True)
class BlobStat:
    sha256: Digest
    size_bytes: int
    written_at: datetime


class Reader(Protocol):
    """The part of a binary file that readers of a blob use."""

    def read(self, size: int = -1, /) -> bytes: ...
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...


class BlobStore(Protocol):
    """Six promises. Errors: `NotFound` for bytes that are not there, `Unavailable` when the store is away or full."""

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
