"""Server-sent events: the document of a job or composition, or what channels serve, on every change.

Each event is the complete state, and its id is a digest of it. A client that sends the last id that it has seen
(`Last-Event-ID`) gets the current state if that differs. It misses nothing, since a later state contains all of an
earlier one, and sees nothing twice.
"""

import time
from collections.abc import AsyncIterator, Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from math import ceil
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Header, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from registry.api.http.feed import Feed, Follower, Key, OpenStreams
from registry.api.http.rules import ASKED_AGAIN
from registry.database.engine import Session
from registry.domain.access.audit import Actor
from registry.domain.jobs.queue import FINISHED
from registry.errors import RegistryError

if TYPE_CHECKING:
    from registry.wire.work import CompositionOut, JobOut

KEEP_ALIVE_S = 25.0
"""Proxies close connections that are idle for about a minute, some after 30 seconds. Most of what an idle stream costs
is this comment."""
MEDIA_TYPE = "text/event-stream"
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
"""nginx would collect events into blocks."""

EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"content": {MEDIA_TYPE: {}}},
    204: {"description": "It has ended, and `Last-Event-ID` names its last event."},
}
"""The answers of a route of events."""
LastEventId = Annotated[
    str | None, Header(description="The id of the last event that was seen: the stream goes on after it.")
]
Look = Callable[[Actor], "JobOut | CompositionOut"]
"""Reads what the actor may see now. Called in a thread; raises once the actor may no longer see it."""
Documents = Callable[[Session, Sequence[int]], "Mapping[int, JobOut | CompositionOut]"]
"""Reads the documents with these ids; leaves out those that no longer exist."""


@dataclass(frozen=True, slots=True)
class StateEvent:
    """A state as an event, and whether it is the last. Two with the same id are equal."""

    id: str
    text: str = field(compare=False)
    is_last: bool = field(default=False, compare=False)


Render = Callable[[Mapping[Key, Hashable | None], Actor], StateEvent | None]
"""Makes the event of the followed states that the actor may read; None ends the stream."""
AskAgain = Callable[[Actor], None]
"""Raises if the actor, whose rights have changed, may no longer follow. Called in a thread."""


def document_event(document: "JobOut | CompositionOut") -> StateEvent:
    """The event of a document. Its heartbeat is left out of the id: it moves although nothing has changed."""
    same = document.model_dump_json(exclude={"heartbeat_at"})
    return StateEvent(sha256(same.encode()).hexdigest()[:16], document.model_dump_json(), document.state in FINISHED)


class DocumentEvents:
    """Reads documents as events. Equal for the same `documents`, so that the streams of all callers share one read."""

    __slots__ = ("_documents",)

    def __init__(self, documents: Documents) -> None:
        self._documents = documents

    def __call__(self, session: Session, ids: Sequence[int]) -> Mapping[int, StateEvent]:
        return {row_id: document_event(document) for row_id, document in self._documents(session, ids).items()}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DocumentEvents) and other._documents is self._documents

    def __hash__(self) -> int:
        return hash(self._documents)


async def stream(
    request: Request, actor: Actor, look: Look, documents: Documents, row_id: int, seen: str | None
) -> Response:
    """The events of a job or composition after the one that was `seen`; 204 if that was the last one, which stops a
    browser from reconnecting. Raises what `look` raises, and TooMany."""
    first = document_event(await run_in_threadpool(look, actor))
    if first.is_last and first.id == seen:
        return Response(status_code=204, headers=HEADERS)
    key: Key = (DocumentEvents(documents), row_id)

    def render(snapshots: Mapping[Key, Hashable | None], _actor: Actor) -> StateEvent | None:
        event = snapshots[key]
        return event if isinstance(event, StateEvent) else None

    def ask_again(now: Actor) -> None:
        look(now)

    return EventStream(request, actor, [key], render, seen, ask_again)


class EventStream(StreamingResponse):
    """Sends the event of what is followed whenever its id changes, until it is the last or the caller may no longer
    follow. Counts as open until it has been sent or the client has hung up."""

    def __init__(
        self,
        request: Request,
        actor: Actor,
        keys: Sequence[Key],
        render: Render,
        seen: str | None,
        ask_again: AskAgain = lambda _actor: None,
    ) -> None:
        streams_of(request).refuse_more(stream_owner(actor))
        super().__init__((), headers=HEADERS, media_type=MEDIA_TYPE)
        self._request, self._actor, self._keys = request, actor, keys
        self._rights = _rights(actor)
        self._render, self._seen, self._ask_again = render, seen, ask_again

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with (
            streams_of(self._request).one(stream_owner(self._actor)),
            feed_of(self._request).follow(self._keys) as follower,
        ):
            self.body_iterator = self._events(follower)
            await super().__call__(scope, receive, send)

    async def _events(self, follower: Follower) -> AsyncIterator[str]:
        seen, said = self._seen, time.monotonic()
        event: StateEvent | None = None
        shown: Mapping[Key, Hashable | None] | None = None
        to = self._rights
        while True:
            # At full seconds, so that idle streams wake the event loop together.
            await follower.news(max(0.0, ceil(said + KEEP_ALIVE_S) - time.monotonic()))
            if follower.is_lost or not await self._may_go_on():
                return
            if follower.snapshots and (follower.snapshots is not shown or self._rights is not to):
                shown, to = follower.snapshots, self._rights
                event = self._render(shown, self._actor)
                if event is None:
                    return
            if event is not None and event.id != seen:
                seen, said = event.id, time.monotonic()
                yield f"id: {event.id}\ndata: {event.text}\n\n"
            elif time.monotonic() - said >= KEEP_ALIVE_S:
                said = time.monotonic()
                yield ": keep-alive\n\n"
            if (event is not None and event.is_last) or self._request.app.state.draining:  # another server goes on
                return

    async def _may_go_on(self) -> bool:
        """Checks whether the caller may still follow. A revoked token or a lost role ends the stream; the next request
        gets the error, since this response has begun. Only roles change what a document shows to a caller."""
        try:
            actor = await ASKED_AGAIN(self._request)
            if (rights := _rights(actor)) != self._rights:
                await run_in_threadpool(self._ask_again, actor)
                self._rights = rights
        except RegistryError:
            return False
        self._actor = actor
        return True


def feed_of(request: Request) -> Feed:
    feed: Feed = request.app.state.feed
    return feed


def streams_of(request: Request) -> OpenStreams:
    streams: OpenStreams = request.app.state.open_streams
    return streams


def stream_owner(actor: Actor) -> str:
    """Whose streams are counted together: a token's, or those of an address without one."""
    address = (actor.source or "").partition(" ")[0]
    return f"{actor.name} {address}" if actor.token_id is None else f"token {actor.token_id}"


def _rights(actor: Actor) -> tuple[object, ...]:
    return actor.name, actor.token_id, dict(actor.grants), actor.public, actor.hidden
