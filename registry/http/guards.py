"""What is refused before a route sees it: bodies that are too long, and pages of other sites."""

from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from registry.errors import NotAllowed, TooLarge
from registry.http.problems import problem_response

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
        if not claimed.isdigit() or int(claimed) > self.limit_bytes:
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
    """Answers 403 to a browser that acts for a page of another site: a form there could post to a loopback server."""

    def __init__(self, app: ASGIApp, names: Sequence[str]) -> None:
        self.app = app
        self.names = names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope.get("headers", ()))
        origin: str = headers.get(b"origin", b"").decode("latin-1")
        if origin and urlsplit(origin).hostname not in self.names:
            error = NotAllowed(
                "other_site", f"Pages of {origin[:200]} may not use this registry.", subject=origin[:200]
            )
            await problem_response(error)(scope, receive, send)
            return
        await self.app(scope, receive, send)
