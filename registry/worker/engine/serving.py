"""Serves the child that runs a job's units: reads the blobs that they name, and stores those that they make."""

import hashlib
import json
import logging
import os
import re
import socket
import threading
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, cast

from pydantic import validate_call

from composer.errors import Interrupted
from composer.formats.checkpoints.checkpoint import Checkpoint
from composer.formats.checkpoints.files import StoredFile, read_all, read_range
from registry.errors import NotAllowed, RegistryError
from registry.formats.references import Digest
from registry.storage.blobs import Reader
from registry.worker.engine.answers import KNOWN, failure_of
from registry.worker.engine.frames import Frame, FrameSocket
from registry.worker.engine.remote import ByteCount, FilePosition
from registry.worker.engine.stores import UnitWriter
from registry.worker.engine.units import BaseHints, HostNode, ResultT, Task, Unit

log = logging.getLogger(__name__)

_DIGEST = re.compile(rb"[0-9a-f]{64}")
_MOST_READ_BYTES = 16 << 20
_MAX_CONNECTIONS = 64
"""A child has one for each thread, and one for each file that it writes."""
_RECENT_BYTES = 128 << 20
"""The size of the recently served ranges to remember: the store itself can copy a block that the child writes back
unchanged."""


class _Ended(Interrupted):
    """The child has ended or must end."""


@dataclass(frozen=True, slots=True)
class _Reply:
    """A message, bytes, and the descriptor of a file, which is closed once it is sent."""

    message: Mapping[str, Any]
    content: bytes | bytearray | memoryview = b""
    file: int | None = None


class JobFiles:
    """Controls a job's access to blobs. Its child may read blobs that units name, in their content or in a shared
    document, and blobs that it stored itself. Everything else is refused."""

    def __init__(self, node: HostNode) -> None:
        self.node = node
        self._named, self._made = set[str](), dict[str, int]()
        self._hints: BaseHints = {"locations": [], "size_bytes": 0}
        self._in_buckets: dict[str, Checkpoint] = {}
        self._recent: deque[tuple[StoredFile, int, bytearray]] = deque()
        self._connections, self._lock, self._ended = set[FrameSocket](), threading.Lock(), False

    def begin(self, unit: Unit) -> None:
        """Allows the blobs that the unit names."""
        self._hints = cast(BaseHints, unit.hints)
        self._name(json.dumps(unit.content).encode())

    def refuse_foreign(self, task: Task[ResultT], unit: Unit, result: ResultT) -> None:
        """Raises NotAllowed if the result names blobs that the child may not read or that are not stored."""
        if not task.intact(replace(self.node, store=_OfJob(self)), result):
            raise _not_of_this_job(unit.name)

    def connect(self, descriptor: int) -> None:
        """Serves a connection in a thread of its own. Closes one that is not a socket, or is one too many."""
        try:
            wire = FrameSocket(socket.socket(fileno=descriptor))
        except OSError:
            with suppress(OSError):
                os.close(descriptor)
            return
        with self._lock:
            if self._ended or len(self._connections) >= _MAX_CONNECTIONS:
                wire.close()
                return
            self._connections.add(wire)
        threading.Thread(target=self._serve, args=(wire,), daemon=True, name="job files").start()

    def close(self) -> None:
        """Ends all connections. Work in progress stops at its next check."""
        with self._lock:
            self._ended = True
            for wire in self._connections:
                wire.close()

    def check(self, _done: int = 0) -> None:
        """Raises Interrupted once the child has ended."""
        if self._ended:
            raise _Ended

    def allowed(self, sha256: str) -> Digest:
        """Returns the digest if the child may read that blob. Raises NotAllowed otherwise."""
        if sha256 not in self._named and sha256 not in self._made:
            raise _not_of_this_job(sha256)
        return Digest(sha256)

    def size_of(self, sha256: str) -> int | None:
        """The size of a blob that the child may read, in bytes; None for any other."""
        if (known := self._made.get(sha256)) is not None:
            return known
        return self.node.store.size_of(Digest(sha256)) if sha256 in self._named else None

    def made(self, sha256: str, size_bytes: int) -> None:
        """Allows a blob that the child has stored."""
        self._made[sha256] = size_bytes

    def shared(self, key: str) -> bytes | None:
        """Reads a document that units share, and allows the blobs that it names. Returns None for a unit's result,
        whose key is not the hash of its content."""
        document = self.node.results.read(self.allowed(key))
        if document is None or hashlib.sha256(document).hexdigest() != key:
            return None
        self._name(document)
        return document

    def base(self, digest: str, *, verified: bool) -> Checkpoint:
        """Opens the base at the unit's locations. Raises as `Bases.open_verified` does."""
        where = self._hints["locations"], self._hints["size_bytes"]
        if verified:
            return self.node.bases.open_verified(digest, *where, self.check)
        return self.node.bases.open(digest, *where, lambda: self.check())

    def base_in_bucket(self, location: str) -> Checkpoint:
        """Opens the base in place, at one of the unit's bucket locations."""
        if location not in self._hints["locations"]:
            raise _not_of_this_job(location)
        name = hashlib.sha256(location.encode()).hexdigest()[:16]
        opened = self.node.bases.open_in_bucket(location, self.node.kept_directory(f"base-{name}"))
        self._in_buckets[location] = opened
        return opened

    def range(self, origin: FilePosition, size_bytes: int) -> bytearray:
        """Reads bytes from a file of a base in a bucket."""
        file, begin = self._in_buckets[origin.location].files[origin.name], origin.offset
        content = read_range(file, begin, begin + min(size_bytes, _MOST_READ_BYTES))
        with self._lock:
            self._recent.append((file, begin, content))
            while sum(len(block) for _, _, block in self._recent) > _RECENT_BYTES:
                self._recent.popleft()
        return content

    def source(self, origin: FilePosition | None, content: bytearray) -> StoredFile | None:
        """The file from which the store may copy these bytes; None unless exactly these bytes were read there."""
        if origin is None:
            return None
        file, offset = self._in_buckets[origin.location].files[origin.name], origin.offset
        with self._lock:
            recent = list(self._recent)
        for known, begin, block in recent:
            first = offset - begin
            if known == file and first >= 0 and block[first : first + len(content)] == content:
                return file
        return None

    def _name(self, document: bytes) -> None:
        self._named |= {match.decode() for match in _DIGEST.findall(document)}

    def _serve(self, wire: FrameSocket) -> None:
        connection = _Connection(self)
        try:
            while True:
                reply = connection.reply(wire.receive())
                try:
                    wire.send(reply.message, reply.content, reply.file)
                finally:
                    if reply.file is not None:
                        os.close(reply.file)
        except (EOFError, OSError, _Ended):  # the child, or its job
            pass
        finally:
            connection.close()
            wire.close()
            with self._lock:
                self._connections.discard(wire)


class _Connection:
    """Handles the requests of one connection, which has at most one reader and one writer open. Requests come from the
    child: a field of another name or type is refused."""

    def __init__(self, files: JobFiles) -> None:
        self._files = files
        self._reader: Reader | None = None
        self._writer: UnitWriter | None = None
        self._blocks: int | None = None
        self._written = 0
        self._requests = {
            "shared": self._shared, "size": self._size, "open": self._open, "read": self._read, "begin": self._begin,
            "write": self._write, "finish": self._finish, "base": self._base, "bucket": self._bucket,
            "range": self._range,
        }  # fmt: skip

    def reply(self, frame: Frame) -> _Reply:
        """Performs the message's request. An error becomes the reply. Only `begin` comes with a file, and only once."""
        self._files.check()
        request = dict(frame.message)
        do = request.pop("do", "")
        try:
            if frame.file is not None:
                if do != "begin" or self._blocks is not None:
                    os.close(frame.file)
                    raise ValueError("a file does not belong to this request")
                self._blocks = frame.file
            return self._requests[do](**request)
        except _Ended:
            raise
        except Exception as error:
            if not isinstance(error, KNOWN):
                log.warning("A unit's request failed", exc_info=error)
            return _Reply({"error": failure_of(error).to_row()})

    def close(self) -> None:
        """Aborts an unfinished write and closes what is open."""
        self._close_reader()
        if self._blocks is not None:
            os.close(self._blocks)
        if self._writer is not None:
            with suppress(RegistryError):  # the store is unreachable; `sweep` removes the rest later
                self._writer.abort()

    def _close_reader(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    @validate_call
    def _shared(self, key: str) -> _Reply:
        document = self._files.shared(key)
        return _Reply({"there": document is not None}, document or b"")

    @validate_call
    def _size(self, sha256: str) -> _Reply:
        return _Reply({"size_bytes": self._files.size_of(sha256)})

    @validate_call
    def _open(self, sha256: str) -> _Reply:
        self._close_reader()
        reader = self._files.node.store.open(self._files.allowed(sha256))
        if (number := _number_of(reader)) is None:
            self._reader = reader
            return _Reply({})
        with reader:
            return _Reply({}, file=os.dup(number))

    @validate_call
    def _read(self, size_bytes: ByteCount) -> _Reply:
        if self._reader is None:
            raise ValueError("nothing is open")
        content = self._reader.read(min(size_bytes, _MOST_READ_BYTES))
        if not content:
            self._close_reader()
        return _Reply({}, content)

    @validate_call
    def _begin(self, size_bytes: ByteCount) -> _Reply:
        if self._blocks is None or self._writer is not None:
            raise ValueError("a file needs its blocks, and is begun once")
        self._writer, self._written = self._files.node.store.begin_write(size_bytes), 0
        return _Reply({})

    @validate_call
    def _write(self, origin: FilePosition | None, at: ByteCount, size_bytes: ByteCount) -> _Reply:
        content = self._block(at, size_bytes)
        source = self._files.source(origin, content)
        offset = origin.offset if origin is not None and source is not None else 0
        self._begun().write(memoryview(content), source, offset)
        self._written += len(content)
        return _Reply({})

    def _block(self, begin: int, size_bytes: int) -> bytearray:
        """Copies a block that the child has written, so that the child can no longer change it."""
        if self._blocks is None or size_bytes > _MOST_READ_BYTES:
            raise ValueError("the child has shared no block of that size")
        content = bytearray(size_bytes)
        read_all(self._blocks, memoryview(content), begin, "a block")
        return content

    def _finish(self) -> _Reply:
        writer = self._begun()
        sha256 = writer.finish()
        self._writer = None
        self._files.made(sha256, self._written)
        return _Reply({"sha256": sha256, "copied_bytes": writer.copied_bytes})

    def _begun(self) -> UnitWriter:
        if self._writer is None:
            raise ValueError("no file was begun")
        return self._writer

    @validate_call
    def _base(self, digest: str, verified: bool) -> _Reply:
        opened = self._files.base(digest, verified=verified)
        return _Reply({"directory": str(opened.path)})

    @validate_call
    def _bucket(self, location: str) -> _Reply:
        opened = self._files.base_in_bucket(location)
        weights = {name: file.size_bytes for name, file in opened.files.items()}
        return _Reply({"directory": str(opened.path), "weights": weights})

    @validate_call
    def _range(self, origin: FilePosition, size_bytes: ByteCount) -> _Reply:
        return _Reply({}, self._files.range(origin, size_bytes))


def _number_of(reader: Reader) -> int | None:
    """The descriptor of a reader's local file; None if it reads anything else."""
    try:
        return cast(BinaryIO, reader).fileno()
    except (AttributeError, OSError):
        return None


class _OfJob:
    """The part of the store that the child may use."""

    def __init__(self, files: JobFiles) -> None:
        self._store, self.size_of = files.node.store, files.size_of
        self.open, self.put, self.begin_write = self._store.open, self._store.put, self._store.begin_write


def _not_of_this_job(subject: str) -> NotAllowed:
    return NotAllowed("not_of_this_job", f"A unit named bytes that its job does not have ({subject}).", subject=subject)
