"""Separate threads for routes that use the blob store.

All other routes share the framework's 40 threads. A hanging store blocks each thread that calls it for a minute or
more: with shared threads, a hundred downloads would also stop resolve and search, which do not need the store.
"""

import math
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

from anyio import CapacityLimiter, WouldBlock, move_on_after, to_thread
from anyio.lowlevel import RunVar
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from registry.errors import Unavailable
from registry.storage.blobs import Reader

P = ParamSpec("P")
R = TypeVar("R")

BLOCK_BYTES = 1 << 20
STORE_THREADS = 32
STORE_ROOM = 64
"""Maximum number of requests that wait for a thread; further ones get a 503 immediately."""
STORE_PATIENCE_S = 5.0
"""How long requests wait for a thread."""


@dataclass(frozen=True, slots=True)
class _Threads:
    """Requests wait for `slots`; with a slot they run under `unlimited`, so that they do not wait for a thread again.

    `streams` are for running responses: a hundred downloads from a slow disk must not turn others away.
    """

    slots: CapacityLimiter
    streams: CapacityLimiter
    unlimited: CapacityLimiter


_threads: RunVar[_Threads] = RunVar("registry.api.http.threads")
"""Per event loop, like the framework's own threads."""


def in_store_threads(route: Callable[P, R]) -> Callable[P, Coroutine[Any, Any, R]]:
    """Decorator for routes that use the store; place it below the route's path decorator.

    Answers 503 if too many others hold or await the store's threads. Adds no extra thread hop.
    """

    @wraps(route)
    async def run(*args: P.args, **kwargs: P.kwargs) -> R:
        threads, borrower = _of_this_loop(), object()
        try:
            threads.slots.acquire_on_behalf_of_nowait(borrower)
        except WouldBlock:
            await _wait_for_slot(threads.slots, borrower)
        try:
            return await to_thread.run_sync(partial(route, *args, **kwargs), limiter=threads.unlimited)
        finally:
            threads.slots.release_on_behalf_of(borrower)

    return run


class BlobResponse(StreamingResponse):
    """Streams bytes from the store. Closes the reader also if the client hangs up."""

    def __init__(self, reader: Reader, status: int, headers: Mapping[str, str]) -> None:
        super().__init__(_blocks(reader), status, headers, "application/octet-stream")
        self._reader = reader

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._reader:
            await super().__call__(scope, receive, send)


async def _blocks(reader: Reader) -> AsyncIterator[bytes]:
    """Reads blocks, waiting for a thread as long as needed: once a response has started, a 503 is too late."""
    streams = _of_this_loop().streams
    while block := await to_thread.run_sync(reader.read, BLOCK_BYTES, limiter=streams):
        yield block


async def _wait_for_slot(slots: CapacityLimiter, borrower: object) -> None:
    if slots.statistics().tasks_waiting >= STORE_ROOM:
        raise _busy()
    with move_on_after(STORE_PATIENCE_S):
        await slots.acquire_on_behalf_of(borrower)
        return
    raise _busy()


def _of_this_loop() -> _Threads:
    try:
        return _threads.get()
    except LookupError:
        made = _Threads(CapacityLimiter(STORE_THREADS), CapacityLimiter(STORE_THREADS), CapacityLimiter(math.inf))
        _threads.set(made)
        return made


def _busy() -> Unavailable:
    return Unavailable(
        "store_busy",
        f"{STORE_THREADS} requests are already waiting for the store: it is slow, unavailable or overloaded.",
        next_step="Try again after the seconds in Retry-After; /readyz tells when the store answers again.",
    )
