"""Messages between a worker and the process that runs its units: JSON, with bytes or an open file beside it."""

import json
import os
import select
import socket
import struct
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, cast

from registry.storage.blobs import MAX_RESULT_BYTES

MAX_BYTES = MAX_RESULT_BYTES
"""The most bytes that may accompany a message."""
_MAX_DOCUMENT_BYTES = MAX_RESULT_BYTES + (16 << 20)
_HEAD = struct.Struct("!II")
_BUFFER_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Frame:
    """A message, the bytes beside it, and the descriptor of a file that the receiver must close."""

    message: dict[str, Any]
    content: bytearray = field(default_factory=bytearray)
    file: int | None = None

    def owned_file(self) -> int:
        """Returns the descriptor. Raises ValueError if there is none."""
        if self.file is None:
            raise ValueError("a message lacks its file")
        return self.file


class FrameSocket:
    """One end of a Unix socket pair. Several threads may send, and one receives."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._sending = threading.Lock()
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            end.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)

    @classmethod
    def pair(cls) -> "tuple[FrameSocket, socket.socket]":
        """Creates a wire, and returns it with the other end."""
        own, other = socket.socketpair()
        return cls(own), other

    def fileno(self) -> int:
        return self._end.fileno()

    def send(
        self, message: Mapping[str, Any], content: bytes | bytearray | memoryview = b"", file: int | None = None
    ) -> None:
        """Sends a message, with at most MAX_BYTES of `content`. Raises OSError if the other end is gone."""
        document = json.dumps(message).encode()
        head = _HEAD.pack(len(document), len(content))
        with self._sending:
            if file is None:
                self._end.sendall(head + document)
            else:
                socket.send_fds(self._end, [head], [file])
                self._end.sendall(document)
            if content:
                self._end.sendall(content)

    def receive(self) -> Frame:
        """Waits for the next message. Raises EOFError once the other end is closed, and for malformed input."""
        file: int | None = None
        try:
            head, files, _, _ = socket.recv_fds(self._end, _HEAD.size, 1, socket.MSG_CMSG_CLOEXEC)
            file = files[0] if files else None
            head += self._exactly(_HEAD.size - len(head)) if head else b""
            document_bytes, content_bytes = _HEAD.unpack(head)
            if document_bytes > _MAX_DOCUMENT_BYTES or content_bytes > MAX_BYTES:
                raise EOFError
            message: object = json.loads(self._exactly(document_bytes))
            if not isinstance(message, dict):
                raise EOFError
            return Frame(cast(dict[str, Any], message), self._exactly(content_bytes), file)
        except BaseException as error:
            if file is not None:
                os.close(file)
            if isinstance(error, (OSError, ValueError, RecursionError, struct.error)):
                raise EOFError from error
            raise

    def is_ready(self, timeout_s: float) -> bool:
        """Whether a message or the end arrives within that time."""
        waiting = select.poll()
        waiting.register(self._end, select.POLLIN)
        return bool(waiting.poll(timeout_s * 1000))

    def detach(self) -> None:
        """Closes this process's descriptor; another process keeps using the same end."""
        self._end.close()

    def close(self) -> None:
        """Closes this end, and wakes a thread that waits for a message."""
        with suppress(OSError):  # the other end was first
            self._end.shutdown(socket.SHUT_RDWR)
        self._end.close()

    def _exactly(self, size_bytes: int) -> bytearray:
        content = bytearray(size_bytes)
        left = memoryview(content)
        while left:
            count = self._end.recv_into(left)
            if not count:
                raise EOFError
            left = left[count:]
        return content
