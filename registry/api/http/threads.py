"""Thread pools for searches, for routes that use the blob store, for bodies, and for exchanges of ID tokens.

All other routes share the framework's 40 threads. A hanging store blocks each thread that calls it for a minute or
more: with shared threads, a hundred downloads would also stop resolve and search, which do not need the store.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial, wraps
from threading import Semaphore
from typing import Any, ParamSpec, TypeVar, cast

from anyio import CapacityLimiter, to_thread
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from registry.errors import TooMany, Unavailable
from registry.storage.blobs import Reader

P = ParamSpec("P")
R = TypeVar("R")

BLOCK_BYTES = 1 << 20
PATIENCE_S = 5.0
"""How long requests wait for a thread: earlier ones may be waiting for the database or the store."""
SEARCH_THREADS, SEARCH_ROOM = 16, 10_000
"""Fewer threads than database connections, so that slow searches leave some for other requests. As many requests may
wait as are answered within PATIENCE_S."""
STORE_THREADS, STORE_ROOM = 32, 512
"""64 clients of the hub fetch 8 files each at once."""
UPLOAD_THREADS = 128
"""They wait for the senders most of the time, and cost little meanwhile."""
EXCHANGE_THREADS, EXCHANGE_ROOM = 8, 64
"""An issuer that hangs blocks each thread that needs its keys, and anyone can send a token that names it."""


class Threads:
    """A decorator for routes: runs them in `count` threads; place it below the route's path decorator.

    A request gets the 503 `busy` if `room` others wait for a thread already, or if it has waited for PATIENCE_S.
    """

    def __init__(self, use: str, busy: str, count: int, room: int, slow: str = "the database or the store") -> None:
        self._use, self._busy, self._count, self._slow = use, busy, count, slow
        self._pool = ThreadPoolExecutor(count, use)
        self._admission = Semaphore(count + room)

    def __call__(self, route: Callable[P, R]) -> Callable[P, Coroutine[Any, Any, R]]:
        @wraps(route)
        async def run(*args: P.args, **kwargs: P.kwargs) -> R:
            if not self._admission.acquire(blocking=False):
                raise self._unavailable()
            try:
                return await self._run(partial(route, *args, **kwargs))
            finally:
                self._admission.release()

        return run

    async def _run(self, call: Callable[[], R]) -> R:
        calls = [call]  # the pool keeps cancelled work until a thread is free, so it must not hold the request itself
        future = self._pool.submit(lambda: calls.pop()())
        timer = asyncio.get_running_loop().call_later(PATIENCE_S, future.cancel)  # no effect once it runs
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if cast(asyncio.Task[Any], asyncio.current_task()).cancelling():  # the request, not the wait, was cancelled
                raise
            raise self._unavailable() from None
        finally:
            timer.cancel()
            calls.clear()

    def _unavailable(self) -> Unavailable:
        return Unavailable(
            self._busy,
            f"All {self._count} {self._use} threads are busy: {self._slow} is slow, or overloaded.",
            next_step="Try again after the seconds in Retry-After; /readyz tells whether database and store answer.",
        )


class UploadThreads:
    """Threads that receive bodies, so that slow senders hold up no other requests.

    One user holds at most `per_user` of them, with all of its tokens, and at most as many as are free for others: it
    needs five more users to fill the last sixteen. None means a single user, who may hold all of them.
    """

    def __init__(self, per_user: int | None) -> None:
        self._limiter, self._per_user = CapacityLimiter(UPLOAD_THREADS), per_user
        self._running: Counter[str] = Counter()

    async def run(self, user: str, receive: Callable[[], R]) -> R:
        """Calls `receive` in a thread. Raises TooMany if the user has its share of them already, and Unavailable if
        none is free for it."""
        free = UPLOAD_THREADS - self._running.total()
        if free <= (0 if self._per_user is None else self._running[user]):
            raise Unavailable(
                "uploads_busy",
                f"{UPLOAD_THREADS - free} of {UPLOAD_THREADS} uploads are under way, the limit of this process.",
            )
        if self._per_user is not None and self._running[user] >= self._per_user:
            raise TooMany("too_many_uploads", f"{user} is sending {self._per_user} files already.", subject=user)
        self._running[user] += 1
        try:
            return await to_thread.run_sync(receive, limiter=self._limiter)
        finally:
            self._running[user] -= 1
            if not self._running[user]:
                del self._running[user]


in_search_threads = Threads("search", "searches_busy", SEARCH_THREADS, SEARCH_ROOM)
in_store_threads = Threads("store", "store_busy", STORE_THREADS, STORE_ROOM)
in_sign_in_threads = Threads("sign-in", "exchanges_busy", EXCHANGE_THREADS, EXCHANGE_ROOM, "the OpenID provider")
in_exchange_threads = Threads("exchange", "exchanges_busy", EXCHANGE_THREADS, EXCHANGE_ROOM, "an issuer of ID tokens")


class BlobResponse(StreamingResponse):
    """Streams bytes from the store. Closes the reader also if the client hangs up."""

    def __init__(self, reader: Reader, status: int, headers: Mapping[str, str]) -> None:
        super().__init__((), status, headers, "application/octet-stream")
        self._reader = reader

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.body_iterator = _blocks(self._reader, scope["app"].state.downloads_limiter)
        with self._reader:
            await super().__call__(scope, receive, send)


async def _blocks(reader: Reader, limiter: CapacityLimiter) -> AsyncIterator[bytes]:
    """Reads blocks, waiting for a thread as long as needed: once a response has started, a 503 is too late."""
    while block := await to_thread.run_sync(reader.read, BLOCK_BYTES, limiter=limiter):
        yield block
