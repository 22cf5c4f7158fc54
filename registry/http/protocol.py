"""HTTP as the server reads it from its sockets, with a bound on what comes before a body.

The fast parser keeps a head of any length, and the application's own limit (`HeaderLimit`) is asked only when all of it
has come: without this bound a client could fill the server's memory with one endless header.
"""

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 256 << 10
"""Above every limit that `ADAPTORY_MAX_HEADER_BYTES` makes sense for: those are answered 431, this one hangs up."""


class BoundedHttp(HttpToolsProtocol):
    """Answers 400 and hangs up when a head does not end in time."""

    _in_head = True
    _head_bytes = 0

    def data_received(self, data: bytes) -> None:
        self._head_bytes += len(data)
        if self._in_head and self._head_bytes > MAX_HEAD_BYTES:
            self.send_400_response(f"The head of the request is longer than {MAX_HEAD_BYTES} bytes.")
            return
        super().data_received(data)

    def on_message_begin(self) -> None:
        self._in_head, self._head_bytes = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()
