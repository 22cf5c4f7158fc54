"""Request dependencies: the process's resources, the body as a stream, parameters."""

import hashlib
from collections.abc import AsyncGenerator, Iterator
from datetime import UTC, datetime
from typing import Annotated, cast

from anyio import CapacityLimiter, fail_after, from_thread
from fastapi import Depends, Header, Path, Request
from pydantic import AfterValidator, BaseModel
from starlette.requests import ClientDisconnect

from registry.api.schemas.wire import MAX_INT64
from registry.database.idempotency import IdempotentRequest
from registry.domain.access.audit import Actor
from registry.errors import Usage
from registry.transfer.resources import Resources

BODY_SILENCE_S = 60
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


def uploads_limiter(request: Request) -> CapacityLimiter:
    """Threads only for request bodies: slow senders hold up other senders, not other requests."""
    return cast(CapacityLimiter, request.app.state.uploads_limiter)


def body_chunks(request: Request) -> Iterator[bytes]:
    """The body in chunks, never all in memory, for a route that runs in a worker thread."""
    stream = request.stream()
    while (chunk := from_thread.run(_next_chunk, stream)) is not None:
        if chunk:
            yield chunk


async def _next_chunk(stream: AsyncGenerator[bytes]) -> bytes | None:
    """The next chunk, None at the end. Times out, so that a stalled sender does not hold a thread forever."""
    try:
        with fail_after(BODY_SILENCE_S):
            return await anext(stream, None)
    except TimeoutError:
        raise Usage(
            "body_silent", f"No part of the body has arrived for {BODY_SILENCE_S} s.", next_step="Send the file again."
        ) from None
    except ClientDisconnect:
        raise Usage(
            "body_cut", "The connection ended before the complete body arrived.", next_step="Send the file again."
        ) from None


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
        raise Usage("body_slow", message, next_step="Send it again.") from None
    except ClientDisconnect:
        raise Usage(
            "body_cut", "The connection ended before the complete body arrived.", next_step="Send it again."
        ) from None


def content_length(request: Request) -> int:
    """The size of the body in bytes. Raises Usage for a request without a Content-Length."""
    text = request.headers.get("content-length", "")
    if not text.isdecimal() or len(text) > MAX_DIGITS:
        raise Usage("length_missing", "The request has no Content-Length.", next_step="Send the size of the body.")
    return int(text)


def _in_utc(moment: datetime) -> datetime:
    try:
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except OverflowError:
        raise ValueError("is not a time in the years 1 to 9999 in UTC") from None


Moment = Annotated[datetime, AfterValidator(_in_utc)]
"""A time in UTC; without an offset, UTC is assumed."""
RequestKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        pattern=r"^[\x21-\x7e]{1,64}$",
        description="Any text that you choose. A repeated request of the same user with the same key within a week "
        "takes effect only once and returns the first result.",
    ),
]
ResourcesOf = Annotated[Resources, Depends(resources_of)]
RowId = Annotated[int, Path(ge=1, le=MAX_INT64)]
