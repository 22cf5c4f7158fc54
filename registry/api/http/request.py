"""From a request: what the process holds, the body as a stream, its parameters."""

import hashlib
from collections.abc import AsyncGenerator, Iterator
from datetime import UTC, datetime
from typing import Annotated, cast

from anyio import CapacityLimiter, fail_after, from_thread
from fastapi import Depends, Header, Path, Request
from pydantic import AfterValidator, BaseModel
from starlette.requests import ClientDisconnect

from registry.api.schemas import MAX_INT64
from registry.database.idempotency import IdempotentRequest
from registry.domain.access.audit import Actor
from registry.errors import Usage
from registry.transfer.resources import Resources

BODY_SILENCE_S = 60
DOCUMENT_S = 300
MAX_DIGITS = 18
"""A decimal of so many digits fits the 64 bits of a column, and is far below what `int` refuses to read."""


async def resources_of(request: Request) -> Resources:
    """Asynchronous only because a plain dependency would be called in a thread of its own."""
    return cast(Resources, request.app.state.resources)


def idempotent_request(request: Request, actor: Actor, key: str | None, body: BaseModel) -> IdempotentRequest | None:
    """The request as it is known again, for a route that takes a `RequestKey`."""
    if key is None:
        return None
    expected = [request.headers.get(name, "") for name in ("If-Match", "If-None-Match")]
    asked = "\n".join((request.method, request.url.path, *expected, body.model_dump_json()))
    return IdempotentRequest(actor.name, key, hashlib.sha256(asked.encode()).hexdigest())


def uploads_limiter(request: Request) -> CapacityLimiter:
    """Threads for bodies alone: whoever sends slowly holds up other senders, not those who ask."""
    return cast(CapacityLimiter, request.app.state.uploads_limiter)


def body_chunks(request: Request) -> Iterator[bytes]:
    """The body, piece by piece, for a route that runs in a worker thread; never the whole of it in memory."""
    stream = request.stream()
    while (chunk := from_thread.run(_next_chunk, stream)) is not None:
        if chunk:
            yield chunk


async def _next_chunk(stream: AsyncGenerator[bytes]) -> bytes | None:
    """None at the end. Who stops sending must not hold a thread for ever."""
    try:
        with fail_after(BODY_SILENCE_S):
            return await anext(stream, None)
    except TimeoutError:
        raise Usage(
            "body_silent", f"Nothing of the body has come for {BODY_SILENCE_S} s.", next_step="Send the file again."
        ) from None
    except ClientDisconnect:
        raise Usage("body_cut", "The body ended before all of it had come.", next_step="Send the file again.") from None


def limit_bytes(request: Request) -> int:
    """How long a document may be."""
    return cast(Resources, request.app.state.resources).settings.max_document_bytes


async def document(request: Request) -> bytes:
    """The whole body, of which `BodyLimit` says how long it may be; what is there of a slow one is in memory."""
    try:
        with fail_after(DOCUMENT_S):
            return await request.body()
    except TimeoutError:
        message = f"The body has not come within {DOCUMENT_S} s."
        raise Usage("body_slow", message, next_step="Send it again.") from None
    except ClientDisconnect:
        raise Usage("body_cut", "The body ended before all of it had come.", next_step="Send it again.") from None


def content_length(request: Request) -> int:
    text = request.headers.get("content-length", "")
    if not text.isdecimal() or len(text) > MAX_DIGITS:
        raise Usage("length_missing", "The request has no Content-Length.", next_step="Send the size of the body.")
    return int(text)


def _in_utc(moment: datetime) -> datetime:
    try:
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except OverflowError:
        raise ValueError("is no moment of the years 1 to 9999 in UTC") from None


Moment = Annotated[datetime, AfterValidator(_in_utc)]
"""In UTC, which is meant where no offset is given."""
RequestKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        pattern=r"^[\x21-\x7e]{1,64}$",
        description="Any text of your own. The same request of the same user once more, under the same key and within "
        "a week, is not done a second time: the answer is what the first one made.",
    ),
]
ResourcesOf = Annotated[Resources, Depends(resources_of)]
RowId = Annotated[int, Path(ge=1, le=MAX_INT64)]
