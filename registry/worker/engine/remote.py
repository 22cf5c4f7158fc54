"""A child's replacements for the store and bases: calls to its worker, which has the credentials.

Each thread has its own connection, so that reads can overlap.
"""

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, cast

from pydantic import BaseModel, Field

from composer.formats.checkpoints.checkpoint import Checkpoint, open_checkpoint
from composer.formats.checkpoints.files import StoredFile
from registry.errors.translation import of_row
from registry.formats.references import Digest
from registry.storage.blobs import Reader
from registry.worker.engine.frames import Frame, FrameSocket

_BLOCK_BYTES = 8 << 20


ByteCount = Annotated[int, Field(strict=True, ge=0)]
"""A number of bytes in a message."""


class FilePosition(BaseModel):
    """Where bytes lie: in a file of the base at a bucket's location."""

    location: str
    name: str
    offset: ByteCount


class Calls:
    """Sends messages to the worker and returns its replies, which may be errors."""

    def __init__(self, wire: FrameSocket) -> None:
        self._wire, self._own = wire, threading.local()

    def connect(self) -> FrameSocket:
        """Opens a new connection to the worker."""
        known, other = FrameSocket.pair()
        with other:
            self._wire.send({"connect": True}, file=other.fileno())
        return known

    def __call__(self, message: Mapping[str, Any]) -> Frame:
        """Sends a message on this thread's connection and returns the reply. Raises the worker's error."""
        if not hasattr(self._own, "connection"):
            self._own.connection = self.connect()
        return _asked(self._own.connection, message)


def _asked(connection: FrameSocket, message: Mapping[str, Any]) -> Frame:
    connection.send(message)
    return _reply(connection)


def _reply(connection: FrameSocket) -> Frame:
    """Receives the next reply. Raises the error in it."""
    reply = connection.receive()
    if error := reply.message.get("error"):
        raise of_row(error)
    return reply


class RemoteDocuments:
    """The documents that units share. Only the worker keeps results."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def read(self, key: str) -> bytes | None:
        reply = self._calls({"do": "shared", "key": key})
        return bytes(reply.content) if reply.message["there"] else None


class RemoteStore:
    """The blobs of the job's units."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def size_of(self, sha256: Digest) -> int | None:
        return self._calls({"do": "size", "sha256": sha256}).message["size_bytes"]

    def open(self, sha256: Digest, /) -> Reader:
        reply = self._calls({"do": "open", "sha256": sha256})
        if reply.file is not None:
            return cast(BinaryIO, os.fdopen(reply.file, "rb"))
        return _RemoteReader(self._calls)

    def put(self, source: Path) -> Digest:
        writer = self.begin_write(source.stat().st_size)
        block = memoryview(bytearray(_BLOCK_BYTES))
        with source.open("rb", buffering=0) as file:
            while count := file.readinto(block):
                writer.write(block[:count])
        digest = writer.finish()
        source.unlink()
        return digest

    def begin_write(self, size_bytes: int) -> "RemoteWriter":
        return RemoteWriter(self._calls.connect(), size_bytes)


class RemoteWriter:
    """A file that the worker hashes and writes, on a connection of its own. One block is in transit at a time, so an
    error surfaces with the next call.

    Blocks are in shared memory: sending one through the socket would take a hundred context switches.
    """

    copied_bytes = 0

    def __init__(self, connection: FrameSocket, size_bytes: int) -> None:
        self._connection, self._at = connection, 0
        self._blocks = os.memfd_create("blocks")
        os.ftruncate(self._blocks, 2 * _BLOCK_BYTES)
        connection.send({"do": "begin", "size_bytes": size_bytes}, file=self._blocks)

    def write(self, block: memoryview, source: StoredFile | None = None, offset: int = 0) -> None:
        known = source if isinstance(source, RemoteFile) else None
        for begin in range(0, block.nbytes, _BLOCK_BYTES):
            origin = known.origin(offset + begin) if known else None
            piece = block[begin : begin + _BLOCK_BYTES]
            os.pwritev(self._blocks, [piece], self._at)
            _reply(self._connection)  # of the block before, in the other half
            self._connection.send({"do": "write", "origin": origin, "at": self._at, "size_bytes": piece.nbytes})
            self._at = _BLOCK_BYTES - self._at

    def finish(self) -> Digest:
        _reply(self._connection)
        reply = _asked(self._connection, {"do": "finish"}).message
        self.abort()
        self.copied_bytes = reply["copied_bytes"]
        return Digest(reply["sha256"])

    def abort(self) -> None:
        self._connection.close()
        if self._blocks >= 0:
            os.close(self._blocks)
            self._blocks = -1


class RemoteBases:
    """The bases of the job's units. The worker locates, downloads and verifies them."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def open(self, digest: str, locations: Sequence[str], size_bytes: int, check: Callable[[], None], /) -> Checkpoint:
        del locations, size_bytes, check  # the worker has the unit's
        return self._opened(digest, verified=False)

    def open_verified(
        self, digest: str, locations: Sequence[str], size_bytes: int, check: Callable[[int], None], /
    ) -> Checkpoint:
        del locations, size_bytes, check
        return self._opened(digest, verified=True)

    def open_in_bucket(self, location: str, directory: Path, /) -> Checkpoint:
        del directory  # the worker has one
        opened = self._calls({"do": "bucket", "location": location}).message
        weights = {name: RemoteFile(self._calls, location, name, size) for name, size in opened["weights"].items()}
        return open_checkpoint(Path(opened["directory"]), weights=weights)

    def release(self) -> None:
        """Does nothing: the worker releases its bases at the end of the job."""

    def _opened(self, digest: str, *, verified: bool) -> Checkpoint:
        opened = self._calls({"do": "base", "digest": digest, "verified": verified}).message
        return open_checkpoint(Path(opened["directory"]))


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A `StoredFile` in a bucket, of the base at `location`."""

    calls: Calls
    location: str
    name: str
    size_bytes: int

    def origin(self, offset: int) -> dict[str, Any]:
        return FilePosition(location=self.location, name=self.name, offset=offset).model_dump()

    def read_into(self, buffer: memoryview, offset: int) -> None:
        for begin in range(0, buffer.nbytes, _BLOCK_BYTES):
            piece = buffer[begin : begin + _BLOCK_BYTES]
            origin = self.origin(offset + begin)
            piece[:] = self.calls({"do": "range", "origin": origin, "size_bytes": piece.nbytes}).content


class _RemoteReader(Reader):
    """Reads the blob that this thread opened last, from a store that is not on this host."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def read(self, size: int = -1, /) -> bytes:
        if size < 0:
            return b"".join(iter(lambda: self.read(_BLOCK_BYTES), b""))
        return bytes(self._calls({"do": "read", "size_bytes": size}).content)

    def close(self) -> None:
        """Does nothing: the worker closes the blob at its end, or when the next one is opened."""
