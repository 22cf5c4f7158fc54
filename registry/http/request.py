"""From a request: what the process holds, and the body as a stream."""

from collections.abc import Iterator
from typing import Annotated, cast

from anyio import from_thread
from fastapi import Depends, Path, Request

from registry.errors import Usage
from registry.resources import Resources
from registry.schemas import MAX_INT64

MAX_DIGITS = 18
"""A decimal of so many digits fits the 64 bits of a column, and is far below what `int` refuses to read."""


async def resources_of(request: Request) -> Resources:
    """Asynchronous only because a plain dependency would be called in a thread of its own."""
    return cast(Resources, request.app.state.resources)


def body_chunks(request: Request) -> Iterator[bytes]:
    """The body, piece by piece, for a route that runs in a worker thread; never the whole of it in memory."""
    stream = request.stream()
    while True:
        try:
            chunk = from_thread.run(stream.__anext__)
        except StopAsyncIteration:
            return
        if chunk:
            yield chunk


def content_length(request: Request) -> int:
    text = request.headers.get("content-length", "")
    if not text.isdecimal() or len(text) > MAX_DIGITS:
        raise Usage("length_missing", "The request has no Content-Length.", next_step="Send the size of the body.")
    return int(text)


ResourcesOf = Annotated[Resources, Depends(resources_of)]
RowId = Annotated[int, Path(ge=1, le=MAX_INT64)]
