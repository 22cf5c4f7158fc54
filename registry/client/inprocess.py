"""An HTTP transport that calls the ASGI application in this process, so that the embedded registry uses the same code.

Bodies stream both ways in chunks, so that a checkpoint never has to fit in memory.
"""

import queue
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from concurrent.futures import Future
from contextlib import ExitStack
from typing import Any, cast

import anyio
import anyio.from_thread
import httpx2

Message = MutableMapping[str, Any]
Application = Callable[
    [Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]
]

_CHUNKS_AHEAD = 4
_LOOK_AGAIN_S = 0.05


class InProcessTransport(httpx2.BaseTransport):
    """Runs one event loop in its own thread; each request is a task in it."""

    def __init__(self, application: Application) -> None:
        self._application = application
        self._stack = ExitStack()
        self._running: set[Future[None]] = set()
        self._portal = self._stack.enter_context(anyio.from_thread.start_blocking_portal())

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        exchange = _Exchange(request)
        running = self._portal.start_task_soon(exchange.run, self._application)
        self._running.add(running)
        running.add_done_callback(self._running.discard)
        start = exchange.next_message()
        return httpx2.Response(
            status_code=start["status"],
            headers=start.get("headers", []),
            stream=_ResponseStream(exchange),
            request=request,
        )

    def close(self) -> None:
        """Ends requests that still run, such as a stream of events that nobody reads any more."""
        for running in list(self._running):
            running.cancel()
        self._stack.close()


class _Exchange:
    """One request and its response: reads the body from the caller's iterator, returns messages through a queue."""

    def __init__(self, request: httpx2.Request) -> None:
        self._request = request
        self._body = iter(cast(httpx2.SyncByteStream, request.stream))
        self._messages: queue.Queue[Message | BaseException] = queue.Queue(maxsize=_CHUNKS_AHEAD)
        self._hung_up = False
        self._body_ended = False

    def next_message(self) -> Message:
        message = self._messages.get()
        if isinstance(message, BaseException):
            raise message
        return message

    def hang_up(self) -> None:
        self._hung_up = True
        while not self._messages.empty():
            self._messages.get_nowait()

    async def run(self, application: Application) -> None:
        try:
            await application(self._scope(), self._receive, self._put)
        except Exception as error:  # raised in the caller's thread, unless that has hung up
            if not self._hung_up:
                await self._put(error)

    async def _receive(self) -> Message:
        """The next chunk of the body; after its end, waits for the caller to hang up."""
        if self._body_ended:
            while not self._hung_up:  # noqa: ASYNC110  (set by the caller's thread, which has no event loop)
                await anyio.sleep(_LOOK_AGAIN_S)
            return {"type": "http.disconnect"}
        chunk = await anyio.to_thread.run_sync(next, self._body, None)
        self._body_ended = chunk is None
        return {"type": "http.request", "body": chunk or b"", "more_body": chunk is not None}

    async def _put(self, message: Message | BaseException) -> None:
        while not self._hung_up:
            try:
                self._messages.put_nowait(message)
            except queue.Full:
                await anyio.sleep(0.001)
            else:
                return
        raise OSError("the caller hung up")  # what a server raises in an application that keeps sending (ASGI 2.4)

    def _scope(self) -> Message:
        url = self._request.url
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": self._request.method,
            "headers": [(name.lower(), value) for name, value in self._request.headers.raw],
            "scheme": url.scheme,
            "path": url.path,
            "raw_path": url.raw_path.partition(b"?")[0],
            "query_string": url.query,
            "server": (url.host, url.port or 80),
            "client": ("127.0.0.1", 0),
            "root_path": "",
        }


class _ResponseStream(httpx2.SyncByteStream):
    def __init__(self, exchange: _Exchange) -> None:
        self._exchange = exchange

    def __iter__(self) -> Iterator[bytes]:
        more = True
        while more:
            message = self._exchange.next_message()
            if message["type"] == "http.response.body":
                more = message.get("more_body", False)
                if body := message.get("body", b""):
                    yield body

    def close(self) -> None:
        self._exchange.hang_up()
