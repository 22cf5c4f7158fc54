"""From a request: what the process holds, who asks, and the body as a stream."""

import getpass
from collections.abc import Iterator
from typing import Annotated, cast

from anyio import from_thread
from fastapi import Depends, Request

from registry.access import EVERYWHERE, Role
from registry.audit import Actor
from registry.errors import Usage
from registry.resources import Resources


def resources_of(request: Request) -> Resources:
    return cast(Resources, request.app.state.resources)


def actor_of(request: Request) -> Actor:
    """The embedded registry has one user, who owns it: it listens and answers on loopback alone."""
    resources = resources_of(request)
    return Actor(resources.settings.user or getpass.getuser(), resources.clock(), {EVERYWHERE: Role.ADMIN})


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
    if not text.isdecimal():
        raise Usage("length_missing", "The request has no Content-Length.", next_step="Send the size of the body.")
    return int(text)


ResourcesOf = Annotated[Resources, Depends(resources_of)]
ActorOf = Annotated[Actor, Depends(actor_of)]
