"""Threads of their own for routes that ask the blob store.

All other routes share the framework's 40 threads. A store that hangs holds each thread that asks it for a minute or
more, so that with shared threads a hundred downloads would stop resolve and search too, which need no store.
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
"""How many requests wait for one of these threads, at most; who comes then is told at once."""
STORE_PATIENCE_S = 5.0
"""For how long they wait."""


@dataclass(frozen=True, slots=True)
class _Threads:
    """`places` is what requests wait for. Who has one runs under `unlimited`: a thread must not be waited for again.

    `streams` are for answers that go on: a hundred downloads from a slow disk are no reason to turn others away.
    """

    places: CapacityLimiter
    streams: CapacityLimiter
    unlimited: CapacityLimiter


_threads: RunVar[_Threads] = RunVar("registry.api.http.threads")
"""Of an event loop, as the framework's own threads are."""


def in_store_threads(route: Callable[P, R]) -> Callable[P, Coroutine[Any, Any, R]]:
    """For every route that needs the store: below the line that gives its path.

    It answers 503 where too many others hold or await the store's threads; no hop to a thread is added.
    """

    @wraps(route)
    async def run(*args: P.args, **kwargs: P.kwargs) -> R:
        threads, borrower = _of_this_loop(), object()
        try:
            threads.places.acquire_on_behalf_of_nowait(borrower)
        except WouldBlock:
            await _wait_for_a_place(threads.places, borrower)
        try:
            return await to_thread.run_sync(partial(route, *args, **kwargs), limiter=threads.unlimited)
        finally:
            threads.places.release_on_behalf_of(borrower)

    return run


class BlobResponse(StreamingResponse):
    """Bytes that the store gives out. What reads them there is closed also where the client hangs up."""

    def __init__(self, reader: Reader, status: int, headers: Mapping[str, str]) -> None:
        super().__init__(_blocks(reader), status, headers, "application/octet-stream")
        self._reader = reader

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._reader:
            await super().__call__(scope, receive, send)


async def _blocks(reader: Reader) -> AsyncIterator[bytes]:
    """Once an answer has begun it waits its turn: a 503 would come too late."""
    streams = _of_this_loop().streams
    while block := await to_thread.run_sync(reader.read, BLOCK_BYTES, limiter=streams):
        yield block


async def _wait_for_a_place(places: CapacityLimiter, borrower: object) -> None:
    if places.statistics().tasks_waiting >= STORE_ROOM:
        raise _busy()
    with move_on_after(STORE_PATIENCE_S):
        await places.acquire_on_behalf_of(borrower)
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
        f"{STORE_THREADS} requests are waiting for the store already: it is slow or away, or too much is asked of it.",
        next_step="Ask again in as many seconds as Retry-After says; /readyz tells when the store answers again.",
    )
