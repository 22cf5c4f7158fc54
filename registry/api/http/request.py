"""Request dependencies: the process's resources, the body as a stream, parameters."""

import hashlib
from collections.abc import AsyncGenerator, Callable, Iterator
from time import monotonic
from typing import Annotated, TypeVar, cast

from anyio import fail_after, from_thread
from fastapi import Depends, Header, Path, Request
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from registry.api.http.threads import UploadThreads
from registry.database.idempotency import IdempotentRequest
from registry.domain.access.audit import Actor
from registry.errors import TooLarge, Usage
from registry.transfer.resources import Resources
from registry.wire.document import MAX_INT64

R = TypeVar("R")

SAFE_METHODS = frozenset({"GET", "HEAD"})
BODY_SILENCE_S = 60
LEAST_BYTES_PER_S = 16 << 10
"""The minimum average rate of a body that takes longer than BODY_SILENCE_S."""
DOCUMENT_S = 300
MAX_DIGITS = 18
"""A number of this many digits fits a 64-bit column, and `int` can parse it."""


async def resources_of(request: Request) -> Resources:
    """Asynchronous only because a synchronous dependency would run in a thread."""
    return cast(Resources, request.app.state.resources)


def idempotent_request(request: Request, actor: Actor, key: str | None, body: BaseModel) -> IdempotentRequest | None:
    """Identifies a repeated request, for a route that takes a `RequestKey`."""
    if key is None:
        return None
    expected = [request.headers.get(name, "") for name in ("If-Match", "If-None-Match")]
    asked = "\n".join((request.method, request.url.path, *expected, body.model_dump_json()))
    return IdempotentRequest(actor.name, key, hashlib.sha256(asked.encode()).hexdigest())


async def receive_body(request: Request, actor: Actor, receive: Callable[[], R]) -> R:
    """Calls a reader of `body_chunks` in a thread for bodies. Raises TooMany for a user who sends many at a time."""
    uploads: UploadThreads = request.app.state.uploads
    return await uploads.run(actor.name, receive)


def body_chunks(request: Request) -> Iterator[bytes]:
    """The body in chunks, never all in memory, for a route that runs in a worker thread. Raises Usage for a sender that
    stalls, or is slower than LEAST_BYTES_PER_S: it would keep the thread."""
    stream, waited_s, taken = request.stream(), 0.0, 0
    while True:
        asked = monotonic()
        chunk = from_thread.run(_next_chunk, stream)
        if chunk is None:
            return
        waited_s, taken = waited_s + monotonic() - asked, taken + len(chunk)
        if waited_s > BODY_SILENCE_S and taken < waited_s * LEAST_BYTES_PER_S:
            raise Usage(
                "body_slow",
                f"{taken:,} bytes of the body were received in {waited_s:.0f} s.",
                next_step=f"Send the file again with at least {LEAST_BYTES_PER_S:,} bytes per second.",
            )
        if chunk:
            yield chunk


async def _next_chunk(stream: AsyncGenerator[bytes]) -> bytes | None:
    """The next chunk, None at the end. Raises Usage if none arrives."""
    try:
        with fail_after(BODY_SILENCE_S):
            return await anext(stream, None)
    except TimeoutError:
        raise Usage("body_silent", f"No part of the body has arrived for {BODY_SILENCE_S} s.") from None
    except ClientDisconnect:
        raise Usage("body_cut", "The connection ended before the complete body arrived.") from None


def limit_bytes(request: Request) -> int:
    """The maximum length of a document."""
    return cast(Resources, request.app.state.resources).settings.max_document_bytes


async def document(request: Request) -> bytes:
    """The complete body, in memory; `BodyLimit` bounds its length."""
    try:
        with fail_after(DOCUMENT_S):
            return await request.body()
    except TimeoutError:
        message = f"The body has not arrived within {DOCUMENT_S} s."
        raise Usage("body_slow", message) from None
    except ClientDisconnect:
        raise Usage("body_cut", "The connection ended before the complete body arrived.") from None


def refuse_longer(request: Request, what: str, most_bytes: int, next_step: str) -> None:
    """Raises TooLarge if the Content-Length is larger; `what` names the body."""
    if content_length(request) > most_bytes:
        raise TooLarge("body_too_large", f"The {what} is longer than {most_bytes:,} bytes.", next_step=next_step)


def content_length(request: Request) -> int:
    """The size of the body in bytes. Raises Usage for a request without a Content-Length."""
    text = request.headers.get("content-length", "")
    if not text.isdecimal() or len(text) > MAX_DIGITS:
        raise Usage("length_missing", "The request has no Content-Length.")
    return int(text)


RequestKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        pattern=r"^[\x21-\x7e]{1,64}$",
        description="Any text. A repeated request of the same user with the same key within a week takes effect "
        "only once and returns the first result.",
    ),
]
ResourcesOf = Annotated[Resources, Depends(resources_of)]
RowId = Annotated[int, Path(ge=1, le=MAX_INT64)]
