"""Server-sent events: the document of a job or composition, on every change until it has ended.

Each event is the whole document, and its id is a digest of the document. A client that sends the last id it has seen
(`Last-Event-ID`) gets the current document if it differs. It misses nothing, since a later document says all that an
earlier one did, and sees nothing twice.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Header, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from registry.api.http.rules import ASKED_AGAIN
from registry.domain.access.audit import Actor
from registry.domain.jobs.queue import FINISHED
from registry.errors import RegistryError, TooMany

if TYPE_CHECKING:
    from registry.api.schemas.work import CompositionOut, JobOut

PER_USER, PER_PROCESS = 20, 200
"""Streams at a time: each reads its job from the database every POLL_S."""
POLL_S = 0.5
KEEP_ALIVE_S = 15.0
"""Proxies close connections that are idle for about a minute."""
_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
"""nginx would collect events into blocks."""

EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}},
    204: {"description": "It has ended, and `Last-Event-ID` names its last event."},
}
"""What a route of events answers."""
LastEventId = Annotated[
    str | None, Header(description="The id of the last event that was seen: the stream goes on after it.")
]


Look = Callable[[Actor], "JobOut | CompositionOut"]
"""What the actor may see now. Called in a thread; raises once the actor may no longer see it."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A document as an event: its text, its id, and whether it is the last."""

    text: str
    id: str
    ended: bool

    @classmethod
    def of(cls, look: Look, actor: Actor) -> "Snapshot":
        """What the actor sees now. The heartbeat is left out of the id: it moves although nothing has changed."""
        document = look(actor)
        same = document.model_dump_json(exclude={"heartbeat_at"})
        return cls(document.model_dump_json(), sha256(same.encode()).hexdigest()[:16], document.state in FINISHED)


class EventStreams:
    """Counts the streams of this process. Used in its event loop alone."""

    def __init__(self) -> None:
        self._open: Counter[str] = Counter()

    def open(self, user: str) -> None:
        """Raises TooMany if the user, or the process, has reached its limit."""
        if self._open[user] >= PER_USER or self._open.total() >= PER_PROCESS:
            raise TooMany(
                "too_many_streams",
                f"{user} has {self._open[user]} event streams open, and this process {self._open.total()}; the limits "
                f"are {PER_USER} for a user and {PER_PROCESS} for a process.",
                subject=user,
                next_step="Close some of them, or poll the job instead.",
            )
        self._open[user] += 1

    def close(self, user: str) -> None:
        self._open[user] -= 1
        self._open += Counter()  # without the users that have none


async def stream(request: Request, actor: Actor, look: Look, seen: str | None) -> Response:
    """The events after the one that was `seen`; 204 if that was the last one, which stops a browser from reconnecting.
    Raises what `look` raises, and TooMany."""
    first = await run_in_threadpool(Snapshot.of, look, actor)
    if first.ended and first.id == seen:
        return Response(status_code=204, headers=_HEADERS)
    return _Events(request, actor.name, _events(request, first, look, seen))


class _Events(StreamingResponse):
    """Counts as open until it has been sent or the client has hung up."""

    def __init__(self, request: Request, user: str, events: AsyncIterator[str]) -> None:
        super().__init__(events, headers=_HEADERS, media_type="text/event-stream")
        self._streams: EventStreams = request.app.state.event_streams
        self._user = user

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._streams.open(self._user)
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._streams.close(self._user)


async def _events(request: Request, snapshot: Snapshot, look: Look, seen: str | None) -> AsyncIterator[str]:
    said = time.monotonic()
    while True:
        if snapshot.id != seen:
            seen, said = snapshot.id, time.monotonic()
            yield f"id: {snapshot.id}\ndata: {snapshot.text}\n\n"
        elif time.monotonic() - said >= KEEP_ALIVE_S:
            said = time.monotonic()
            yield ": keep-alive\n\n"
        if snapshot.ended or request.app.state.draining:  # another server goes on
            return
        await asyncio.sleep(POLL_S)
        try:
            actor = await ASKED_AGAIN(request)  # a revoked token ends the stream
            snapshot = await run_in_threadpool(Snapshot.of, look, actor)
        except RegistryError:  # the answer has begun: the next request gets this error
            return
