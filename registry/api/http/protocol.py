"""The server's HTTP protocol, with bounds on request heads, trailers and chunk framing.

The parser buffers heads of any length, and the application's own limit (`HeaderLimit`) applies only to a complete head:
without this bound, a client could fill the server's memory with one endless header.
"""

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from registry.api.http.exchanges import Exchange, current
from registry.api.http.guards import headers_too_large
from registry.api.http.problems import problem_response
from registry.errors import RegistryError, Usage

MAX_HEAD_BYTES = 256 << 10
"""Above any sensible `ADAPTORY_MAX_HEADER_BYTES`. Exceeding that keeps the connection open; exceeding this closes
it."""
MAX_PIPELINED = 100
"""Maximum number of requests that may wait for earlier responses on a connection."""
HEAD_S = 30
"""Time within which a head must end; that of the first request counts from the connection."""
STUCK_S = 10.0
"""How long a stopping server waits for a client that has stopped reading: a stream of events has no end."""
MAX_DISCARDED_BYTES, LINGER_S = 4 << 20, 2
"""How much of a refused head is still read, and for how long."""


class BoundedHttp(HttpToolsProtocol):
    """Answers 431 and closes the connection if a head is too long; closes it if a head is too slow, or if trailers or
    chunk framing are too long.

    Ignores trailers: the parser would add them to the headers, where they could override what a proxy had checked.

    uvicorn's h11 protocol has a limit for heads but no deadline, and answered 7 to 20 % fewer resolves a second.
    """

    _in_head = True
    _refused = False
    _loose_bytes = 0
    """Bytes received since the last end of a head or the last piece of a body."""
    _too_late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._too_late = self.loop.call_later(HEAD_S, self.transport.close)

    def data_received(self, data: bytes) -> None:
        self._loose_bytes += len(data)
        if self._refused:
            if self._loose_bytes > MAX_DISCARDED_BYTES:
                self.transport.close()
            return
        super().data_received(data)
        if self._loose_bytes > MAX_HEAD_BYTES:
            if self._in_head:
                # Read on briefly: a client that is still sending at the close would miss the answer.
                self._refused = True
                self._answer(headers_too_large(MAX_HEAD_BYTES), 431)
                self.loop.call_later(LINGER_S, self.transport.close)
            else:
                self.transport.close()
        elif self._in_head and self._too_late is None:  # usually a later head arrives at once and needs no timer
            self._too_late = self.loop.call_later(HEAD_S, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        super().shutdown()
        self.loop.call_later(STUCK_S, self._end_if_stuck, self.transport.get_write_buffer_size())

    def _end_if_stuck(self, unsent_bytes: int) -> None:
        """Ends a connection whose client has read nothing since, and checks any other again later."""
        left = self.transport.get_write_buffer_size()
        if left and left == unsent_bytes:
            self.transport.abort()
        elif not self.transport.is_closing() or left:
            self.loop.call_later(STUCK_S, self._end_if_stuck, left)

    def on_message_begin(self) -> None:
        self._in_head, self._loose_bytes = True, 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head, self._loose_bytes = False, 0
        self._stop_clock()
        super().on_headers_complete()

        if len(self.pipeline) > MAX_PIPELINED:
            raise ValueError("too many requests wait")  # stops the parser, which answers 400

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.pipeline:  # the server resumes reading after each response, however many requests wait
            self.flow.pause_reading()

    def on_body(self, body: bytes) -> None:
        self._loose_bytes = 0
        super().on_body(body)

    def _stop_clock(self) -> None:
        if self._too_late is not None:
            self._too_late.cancel()
            self._too_late = None

    def send_400_response(self, msg: str) -> None:
        """Answers invalid HTTP or too many pipelined requests, after which the parser stops."""
        self._answer(Usage("bad_http", f"{msg.rstrip('.')}."), 400)
        self.transport.close()

    def _answer(self, error: RegistryError, status: int) -> None:
        """Writes a problem document like the application's, with its own request id; the connection then closes."""
        exchange = Exchange()
        token = current.set(exchange)
        problem = problem_response(error, status, {"Connection": "close", "X-Request-Id": exchange.request_id})
        current.reset(token)
        lines = [b"HTTP/1.1 %d " % status, *(b"%s: %s" % header for header in problem.raw_headers)]
        self.transport.write(b"\r\n".join(lines) + b"\r\n\r\n" + bytes(problem.body))
