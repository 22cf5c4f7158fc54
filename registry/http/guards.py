"""What is refused before a route sees it: bodies that are too long, names that are not ours, pages of other sites."""

from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from registry.errors import NotAllowed, RegistryError, TooLarge, Usage
from registry.http.problems import problem_response
from registry.http.request import MAX_DIGITS

BLOB_PATHS = "/v1/blobs/"
"""Their size is limited by `max_file_bytes`, where they are received."""


class BodyLimit:
    """Answers 413 to a document longer than `limit_bytes`, by its Content-Length or, without one, as it arrives."""

    def __init__(self, app: ASGIApp, limit_bytes: int) -> None:
        self.app = app
        self.limit_bytes = limit_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(BLOB_PATHS):
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        claimed = headers.get(b"content-length", b"0")
        if not claimed.isdigit() or len(claimed) > MAX_DIGITS or int(claimed) > self.limit_bytes:
            await problem_response(self._error())(scope, receive, send)
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
        if taken > self.limit_bytes:  # the framework calls whatever goes wrong with a body a 400
            await problem_response(self._error())(scope, receive, send)

    def _error(self) -> TooLarge:
        return TooLarge(
            "body_too_large",
            f"The body is longer than {self.limit_bytes:,} bytes.",
            next_step="ADAPTORY_MAX_DOCUMENT_BYTES sets the limit.",
        )


class SameSite:
    """Answers only to its own names: 400 to a request by another name, 403 to a browser that acts for another site.

    A page on the web could point a name of its own at loopback, and a form there could post to a loopback server.
    """

    def __init__(self, app: ASGIApp, names: Sequence[str]) -> None:
        self.app = app
        self.names = names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._error(dict(scope["headers"])) if scope["type"] == "http" else None
        answer = self.app if error is None else problem_response(error)
        await answer(scope, receive, send)

    def _error(self, headers: Mapping[bytes, bytes]) -> RegistryError | None:
        host = headers.get(b"host", b"").decode("latin-1")
        origin = headers.get(b"origin", b"").decode("latin-1")
        if _hostname(f"//{host}") not in self.names:
            return Usage(
                "unknown_host",
                f"This registry does not go by the name {host[:200]!r}.",
                subject=host[:200],
                next_step=f"Ask for it as {self.names[0]}.",
            )
        if origin and _hostname(origin) not in self.names:
            return NotAllowed(
                "other_site",
                f"Pages of {origin[:200]} may not use this registry.",
                subject=origin[:200],
                next_step=f"Use a page of {self.names[0]}, or a client that is no browser.",
            )
        return None


def _hostname(url: str) -> str | None:
    """None also for what is no URL, such as `http://[`."""
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None
