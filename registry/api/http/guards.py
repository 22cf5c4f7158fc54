"""Middleware that refuses requests before any route: oversized bodies and headers, floods, other hosts and sites."""

import re
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from registry.api.http.callers import ActorCache, Credentials, credentials_of
from registry.api.http.file_origin import FILES_PATH
from registry.api.http.problems import error_response
from registry.api.http.request import MAX_DIGITS
from registry.environment.network import is_loopback
from registry.errors import NotAllowed, RegistryError, TooLarge, TooMany, Unauthenticated, Usage

if TYPE_CHECKING:
    from limits import RateLimitItem

BLOB_PATHS = "/v1/blobs/"
STREAMED = re.compile(rf"{BLOB_PATHS}|/api/lfs/|/api/models/[^/]+/[^/]+/commit/|/xet/")
"""Limited when they are received: they never are in memory."""
SIGN_IN_PATH = "/login"
FOLLOW_PATH = "/v1/follow"
HEALTH_PATHS = ("/healthz", "/readyz")
"""Not counted: probes are frequent, and share the address of a proxy in front."""
NAMELESS_PATHS = (*HEALTH_PATHS, "/metrics")
_STATUS = {"unknown_host": 421}


class BodyLimit:
    """Answers 413 to a body longer than `limit_bytes`, by its Content-Length or, without one, as it arrives."""

    def __init__(self, app: ASGIApp, limit_bytes: int) -> None:
        self.app = app
        self.limit_bytes = limit_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or STREAMED.match(scope["path"]):
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        claimed = headers.get(b"content-length", b"0")
        if not claimed.isdigit() or len(claimed) > MAX_DIGITS or int(claimed) > self.limit_bytes:
            await error_response(scope, self._error())(scope, receive, send)
            return
        taken = 0

        async def bounded() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self.limit_bytes:
                raise self._error()
            return message

        async def answer(message: Message) -> None:
            if taken <= self.limit_bytes:
                await send(message)

        await self.app(scope, bounded, answer)
        if taken > self.limit_bytes:  # the framework would answer 400
            await error_response(scope, self._error())(scope, receive, send)

    def _error(self) -> TooLarge:
        return TooLarge(
            "body_too_large",
            f"The body is longer than {self.limit_bytes:,} bytes.",
            next_step="Send less, or ask an operator to raise ADAPTORY_MAX_DOCUMENT_BYTES on the server; a base needs "
            "about 200 bytes per tensor.",
        )


def headers_too_large(limit_bytes: int) -> TooLarge:
    """The error for headers and query above the limit."""
    return TooLarge("headers_too_large", f"Headers and query are longer than {limit_bytes:,} bytes.")


class HeaderLimit:
    """Answers 431 if headers and query are together longer than `limit_bytes`."""

    def __init__(self, app: ASGIApp, limit_bytes: int) -> None:
        self.app = app
        self.limit_bytes = limit_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            taken = len(scope["query_string"]) + sum(len(name) + len(value) for name, value in scope["headers"])
            if taken > self.limit_bytes:
                await error_response(scope, headers_too_large(self.limit_bytes), 431)(scope, receive, send)
                return
        await self.app(scope, receive, send)


class CallerLimits:
    """Answers 429 to a caller with too many requests, counted by token, else by address.

    Invalid tokens are also counted by address, since anyone can invent any number of them. After too many of those,
    the token of each request from the address is checked first. Valid tokens are then counted alone, since others may
    share the address.

    Invalid tokens at sign-in are counted too; after too many, nobody can sign in from the address.

    Streams and waiting polls are not counted here but while they are open (`OpenStreams`).

    Each server process counts separately.
    """

    def __init__(self, app: ASGIApp, callers: ActorCache) -> None:
        import limits  # imported here: only servers with tokens need it
        from limits.storage import MemoryStorage
        from limits.strategies import FixedWindowRateLimiter

        self.app = app
        rate = callers.resources.settings.rate_limit
        self._callers = callers
        self._rate = limits.parse(rate) if rate else None
        self._window = FixedWindowRateLimiter(MemoryStorage())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in HEALTH_PATHS:
            await self.app(scope, receive, send)
            return
        credentials, rate = credentials_of(dict(scope["headers"]), scope.get("client")), self._rate
        signs_in = scope["path"] == SIGN_IN_PATH and scope["method"] == "POST"

        async def count_guesses(message: Message) -> None:
            denied = message["type"] == "http.response.start" and message["status"] == 401
            if denied and rate and (credentials.authorization or signs_in):
                self._window.hit(rate, _guesses(credentials))
            await send(message)

        error = await self._refusal(rate, credentials, signs_in=signs_in, streams=_streams(scope)) if rate else None
        if error is not None:
            await error_response(scope, error)(scope, receive, send)
        else:
            await self.app(scope, receive, count_guesses)

    async def _refusal(
        self, rate: "RateLimitItem", credentials: Credentials, *, signs_in: bool, streams: bool
    ) -> RegistryError | None:
        """Counts the request. Returns the error if it is refused."""
        guesses = _guesses(credentials)
        if signs_in and not self._window.test(rate, guesses):
            return self._too_many(rate, guesses, "invalid tokens from this address")
        if credentials.authorization and not self._window.test(rate, guesses):
            try:
                if self._callers.remembered(credentials) is None:
                    await run_in_threadpool(self._callers.ask, credentials)
            except Unauthenticated:
                return self._too_many(rate, guesses, "invalid tokens from this address")
            except RegistryError as error:
                return error
        if not streams and not self._window.hit(rate, credentials.key):
            whom = "this token" if credentials.authorization else "no token, from this address"
            return self._too_many(rate, credentials.key, whom)
        return None

    def _too_many(self, rate: "RateLimitItem", key: str, whom: str) -> TooMany:
        error = TooMany("too_many_requests", f"More than {rate} requests with {whom}.")
        return error.again_in(self._window.get_window_stats(rate, key).reset_time - time.time())


def _streams(scope: Scope) -> bool:
    """Recognizes a request that follows channels for a while."""
    headers = dict(scope["headers"])
    waits = b"text/event-stream" in headers.get(b"accept", b"") or b"wait" in headers.get(b"prefer", b"")
    return scope["path"] == FOLLOW_PATH and waits


def _guesses(credentials: Credentials) -> str:
    """The key under which an address's invalid tokens are counted."""
    return f"guesses {credentials.address}"


class OwnHost:
    """Answers only requests to its own host names, if it has any: 421 for others, and 400 for two names at once, which
    a proxy and this server could read differently. Probes and scrapers use an address. The host of `files` answers
    with files of users alone, and no other host does."""

    def __init__(self, app: ASGIApp, names: Sequence[str], files: str = "") -> None:
        self.app = app
        self.names, self.files = names, files

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._error(scope) if scope["type"] == "http" else None
        answer = self.app if error is None else error_response(scope, error, _STATUS.get(error.code))
        await answer(scope, receive, send)

    def _error(self, scope: Scope) -> RegistryError | None:
        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        if len(hosts) > 1:
            return Usage("bad_http", "The request has more than one Host header.", next_step="Send one.")
        host, path = "".join(hosts), str(scope["path"])
        name = _hostname(f"//{host}")
        if path in NAMELESS_PATHS:
            return None
        if self.files and (name == self.files) != path.startswith(FILES_PATH):
            what = "answers with files of users alone" if name == self.files else "does not answer with files of users"
            message, next_step = f"{host[:200]} {what}.", "Use the address from the registry."
        elif not self.names or name == self.files or self._is_own(name):
            return None
        else:
            message, next_step = f"This registry does not answer to {host[:200]!r}.", f"Use {self.names[0]}."
        return Usage("unknown_host", message, subject=host[:200], next_step=next_step)

    def _is_own(self, name: str | None) -> bool:
        return name in self.names


class SameSite(OwnHost):
    """Answers only requests to loopback names, and 403 to pages of other sites.

    A website could point its own host name at loopback, or post a form to a loopback server.
    """

    def _error(self, scope: Scope) -> RegistryError | None:
        if error := super()._error(scope):
            return error
        origin = dict(scope["headers"]).get(b"origin", b"").decode("latin-1")
        if origin and not self._is_own(_hostname(origin)):
            return NotAllowed(
                "other_site",
                f"Pages of {origin[:200]} may not use this registry.",
                subject=origin[:200],
                next_step=f"Use a page of {self.names[0]}, or a client other than a browser.",
            )
        return None

    def _is_own(self, name: str | None) -> bool:
        """No website has one of these names or a loopback address."""
        return super()._is_own(name) or is_loopback(name or "")


def _hostname(url: str) -> str | None:
    """The host name; None also for an invalid URL, such as `http://[`."""
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None
