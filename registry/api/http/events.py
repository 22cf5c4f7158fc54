"""Server-sent events: the document of a job or composition, on every change until it has ended.

Each event is the whole document, and its id is a digest of the document. A client that sends the last id it has seen
(`Last-Event-ID`) gets the current document if it differs. It misses nothing, since a later document says all that an
earlier one did, and sees nothing twice.

One reader a process reads every followed document, however many streams follow it, and wakes the streams of those that
have changed.
"""

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Header, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import State
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from registry.api.http.rules import ASKED_AGAIN
from registry.database.engine import Session
from registry.domain.access.audit import Actor
from registry.domain.jobs.queue import FINISHED
from registry.errors import RegistryError, TooMany
from registry.transfer.resources import Resources

if TYPE_CHECKING:
    from registry.wire.work import CompositionOut, JobOut

PER_USER, PER_PROCESS = 20, 200
"""Streams at a time."""
POLL_S = 0.5
ASK_AGAIN_S = 5.0
"""How late a stream without events notices that its token was revoked."""
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
Documents = Callable[[Session, Sequence[int]], "Mapping[int, JobOut | CompositionOut]"]
"""The documents with these ids; those that no longer exist are left out."""
Key = tuple[Documents, int]


@dataclass(frozen=True, slots=True)
class DocumentEvent:
    """A document as an event: its text, its id, and whether it is the last."""

    text: str
    id: str
    ended: bool

    @classmethod
    def of(cls, document: "JobOut | CompositionOut") -> "DocumentEvent":
        """The heartbeat is left out of the id: it moves although nothing has changed."""
        same = document.model_dump_json(exclude={"heartbeat_at"})
        return cls(document.model_dump_json(), sha256(same.encode()).hexdigest()[:16], document.state in FINISHED)


@dataclass(slots=True)
class Followed:
    """A document that streams follow. `latest` is None before it has been read for all of them, and `is_lost` once it
    cannot be read."""

    streams: int = 0
    latest: DocumentEvent | None = None
    is_lost: bool = False
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, snapshot: DocumentEvent | None) -> None:
        if snapshot is None or self.latest is None or snapshot.id != self.latest.id:
            self.latest, self.is_lost = snapshot, snapshot is None
            self.wake()

    def wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    async def news(self, within_s: float) -> None:
        """Returns at the next change, or after that time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._news.wait()


class Feed:
    """Reads the followed documents every POLL_S, all in one transaction. Used in its process's event loop alone."""

    def __init__(self, resources: Resources, state: State) -> None:
        self._resources, self._state = resources, state
        self._followed: dict[Key, Followed] = {}
        self._reader: asyncio.Task[None] | None = None

    @contextmanager
    def follow(self, key: Key) -> Generator[Followed]:
        """Follows a document; the first stream starts the reader, and the last one ends it."""
        followed = self._followed.setdefault(key, Followed())
        followed.streams += 1
        followed.latest = None  # the new stream may have seen another one
        if self._reader is None or self._reader.done():
            self._reader = asyncio.create_task(self._read_on())
        try:
            yield followed
        finally:
            followed.streams -= 1
            if not followed.streams:
                del self._followed[key]

    async def _read_on(self) -> None:
        while self._followed:
            await asyncio.sleep(POLL_S)
            followed, snapshots = dict(self._followed), dict[Key, DocumentEvent]()
            try:
                snapshots = await run_in_threadpool(self._read, list(followed))
            except RegistryError:  # ends the streams: the next request gets this error
                continue
            finally:
                for key, one in followed.items():
                    one.put(snapshots.get(key))
                    if self._state.draining:
                        one.wake()

    def _read(self, keys: Sequence[Key]) -> dict[Key, DocumentEvent]:
        wanted = defaultdict[Documents, list[int]](list)
        for documents, row_id in keys:
            wanted[documents].append(row_id)
        read = dict[Key, DocumentEvent]()
        with self._resources.read() as session:
            for documents, ids in wanted.items():
                rows = documents(session, ids).items()
                read |= {(documents, row_id): DocumentEvent.of(document) for row_id, document in rows}
        return read


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
            )
        self._open[user] += 1

    def close(self, user: str) -> None:
        self._open[user] -= 1
        self._open += Counter()  # without the users that have none


async def stream(request: Request, actor: Actor, look: Look, key: Key, seen: str | None) -> Response:
    """The events after the one that was `seen`; 204 if that was the last one, which stops a browser from reconnecting.
    `key` leads to the same document as `look`. Raises what `look` raises, and TooMany."""
    first = DocumentEvent.of(await run_in_threadpool(look, actor))
    if first.ended and first.id == seen:
        return Response(status_code=204, headers=_HEADERS)
    return _Events(request, actor, look, key, first, seen)


class _Events(StreamingResponse):
    """Counts as open until it has been sent or the client has hung up."""

    def __init__(
        self, request: Request, actor: Actor, look: Look, key: Key, first: DocumentEvent, seen: str | None
    ) -> None:
        super().__init__((), headers=_HEADERS, media_type="text/event-stream")
        self._request, self._actor, self._look, self._key = request, actor, look, key
        self._first, self._seen = first, seen

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state, user = self._request.app.state, self._actor.name
        streams: EventStreams = state.event_streams
        feed: Feed = state.feed
        streams.open(user)
        try:
            with feed.follow(self._key) as followed:
                self.body_iterator = self._events(followed)
                await super().__call__(scope, receive, send)
        finally:
            streams.close(user)

    async def _events(self, followed: Followed) -> AsyncIterator[str]:
        snapshot, seen, said = self._first, self._seen, time.monotonic()
        while True:
            if snapshot.id != seen:
                seen, said = snapshot.id, time.monotonic()
                yield f"id: {snapshot.id}\ndata: {snapshot.text}\n\n"
            elif time.monotonic() - said >= KEEP_ALIVE_S:
                said = time.monotonic()
                yield ": keep-alive\n\n"
            if snapshot.ended or self._request.app.state.draining:  # another server goes on
                return
            await followed.news(max(POLL_S, min(ASK_AGAIN_S, KEEP_ALIVE_S)))
            if followed.is_lost or not await self._may_go_on():
                return
            snapshot = followed.latest or snapshot

    async def _may_go_on(self) -> bool:
        """Whether the caller may still see the document: a revoked token or a lost role ends the stream, and the next
        request gets the error, since the answer has begun. What a document shows to whom changes with roles alone."""
        try:
            actor = await ASKED_AGAIN(self._request)
            if _rights(actor) != _rights(self._actor):
                await run_in_threadpool(self._look, actor)
        except RegistryError:
            return False
        self._actor = actor
        return True


def _rights(actor: Actor) -> tuple[object, ...]:
    return actor.name, actor.token_id, dict(actor.grants), actor.public, actor.hidden
