"""HTTP as the server reads it from its sockets, with a bound on what comes before a body.

The fast parser keeps a head of any length, and the application's own limit (`HeaderLimit`) is asked only when all of it
has come: without this bound a client could fill the server's memory with one endless header.
"""

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from registry.http.guards import headers_too_large
from registry.http.problems import problem_response

MAX_HEAD_BYTES = 256 << 10
"""Above every limit that `ADAPTORY_MAX_HEADER_BYTES` makes sense for: those leave the connection open, this one hangs
up."""
MAX_DISCARDED_BYTES, LINGER_S = 4 << 20, 2
"""What is still read, and for how long, of a head that was refused."""


class BoundedHttp(HttpToolsProtocol):
    """Answers 431 and hangs up when a head does not end in time."""

    _in_head = True
    _refused = False
    _head_bytes = 0

    def data_received(self, data: bytes) -> None:
        self._head_bytes += len(data)
        if self._refused:
            if self._head_bytes > MAX_DISCARDED_BYTES:
                self.transport.close()
            return
        if self._in_head and self._head_bytes > MAX_HEAD_BYTES:
            self._refuse()
            return
        super().data_received(data)

    def on_message_begin(self) -> None:
        self._in_head, self._head_bytes = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()

    def _refuse(self) -> None:
        """Reads on for a moment: who is still sending when the connection is closed does not get to see the answer."""
        self._refused = True
        told = problem_response(headers_too_large(MAX_HEAD_BYTES), 431, {"Connection": "close"})
        lines = [b"HTTP/1.1 431 ", *(b"%s: %s" % header for header in told.raw_headers)]
        self.transport.write(b"\r\n".join(lines) + b"\r\n\r\n" + bytes(told.body))
        self.loop.call_later(LINGER_S, self.transport.close)
