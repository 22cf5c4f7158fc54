"""Follows channels: what they serve, and every change of it."""

import re
import time
from collections.abc import Hashable, Mapping, Sequence
from hashlib import sha256
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from registry.api.http.events import (
    HEADERS,
    MEDIA_TYPE,
    EventStream,
    LastEventId,
    StateEvent,
    feed_of,
    stream_owner,
    streams_of,
)
from registry.api.http.feed import Key
from registry.api.http.request import ResourcesOf
from registry.api.http.routes import Route
from registry.api.http.rules import ASKED_AGAIN, Caller
from registry.domain.access.audit import Actor
from registry.domain.access.roles import may_read, refuse_anonymous
from registry.domain.channels.serving import ChannelName, ChannelState, states
from registry.errors import Usage
from registry.formats.references import parse_reference
from registry.transfer.resources import Resources
from registry.wire.quality import MAX_FOLLOWED, CandidateOut, FollowedOut, FollowOut

router = APIRouter(tags=["channels"], route_class=Route)

MAX_WAIT_S = 60
HUNG_UP_S = 1.0
"""How often a long poll checks that its client is still connected."""
_WAIT = re.compile(r"(?:^|[,;\s])wait\s*=\s*\"?(\d{1,6})\"?")
Names = Annotated[str, Query(max_length=20_000, description="NAMESPACE/NAME@CHANNEL, several with commas.")]
Prefer = Annotated[str | None, Header(description="`wait=30`: wait as many seconds for a change, 60 at most.")]
IfNoneMatch = Annotated[str | None, Header(description="The ETag of the state that was seen last.")]


@router.get("/v1/follow", response_model=FollowOut, responses={200: {"content": {MEDIA_TYPE: {}}}, 304: {}})
async def follow(  # noqa: PLR0913
    channels: Names,
    resources: ResourcesOf,
    actor: Caller,
    request: Request,
    prefer: Prefer = None,
    if_none_match: IfNoneMatch = None,
    last_event_id: LastEventId = None,
) -> Response:
    """The state of the channels: the last move of each, and the version and commit that it serves. A channel that does
    not exist, or that the caller may not read, is null.

    With `Accept: text/event-stream`, sends an event at every change after the one of `Last-Event-ID`, and a comment
    after 25 seconds without a change. Otherwise responds once: immediately, or with `Prefer: wait=30` and
    `If-None-Match` as soon as the state has changed, and with 304 if it has not.
    """
    names = _parse(channels)
    if not any(may_read(actor, name.repository.namespace) for name in names):
        refuse_anonymous(actor)
    keys: list[Key] = [(states, name) for name in names]
    if MEDIA_TYPE in request.headers.get("accept", ""):
        return EventStream(request, actor, keys, _event, last_event_id)
    seen = None if if_none_match is None else if_none_match.strip().removeprefix("W/").strip('"')
    wait = _WAIT.search(prefer or "")
    wait_s = min(int(wait[1]), MAX_WAIT_S) if wait else 0  # `Prefer: wait=N` (RFC 7240)
    event = await _changed(request, resources, actor, keys, seen, wait_s)
    headers = {**HEADERS, "ETag": f'"{event.id}"', "Vary": "Accept, Authorization, Prefer"}
    if wait_s:
        headers["Preference-Applied"] = f"wait={wait_s}"
    if event.id == seen:
        return Response(status_code=304, headers=headers)
    return Response(event.text, media_type="application/json", headers=headers)


async def _changed(
    request: Request, resources: Resources, actor: Actor, keys: Sequence[Key], seen: str | None, wait_s: int
) -> StateEvent:
    """The state once it differs from `seen`, or when the time is up."""
    if not wait_s:
        return _event(await run_in_threadpool(_read, resources, keys), actor)
    until = time.monotonic() + wait_s
    with streams_of(request).one(stream_owner(actor)), feed_of(request).follow(keys) as follower:
        while (left_s := until - time.monotonic()) > 0:
            if await follower.news(min(left_s, HUNG_UP_S)):
                actor = await ASKED_AGAIN(request)
            if follower.is_lost or request.app.state.draining or await request.is_disconnected():
                break
            if follower.snapshots and _event(follower.snapshots, actor).id != seen:
                break
    read = await run_in_threadpool(_read, resources, keys)
    return _event(read, await ASKED_AGAIN(request))


def _read(resources: Resources, keys: Sequence[Key]) -> Mapping[Key, Hashable | None]:
    with resources.snapshot() as session:
        read = states(session, [name for _, name in keys if isinstance(name, ChannelName)])
    return {key: read.get(name) for key in keys if isinstance(name := key[1], ChannelName)}


def _event(snapshots: Mapping[Key, Hashable | None], actor: Actor) -> StateEvent:
    shown: dict[str, FollowedOut | None] = {}
    for (_, name), state in snapshots.items():
        if isinstance(name, ChannelName):
            readable = may_read(actor, name.repository.namespace)
            shown[str(name)] = _followed(state) if readable and isinstance(state, ChannelState) else None
    text = FollowOut(channels=dict(sorted(shown.items()))).model_dump_json()
    return StateEvent(sha256(text.encode()).hexdigest()[:16], text)


def _followed(state: ChannelState) -> FollowedOut:
    beside = state.candidate
    return FollowedOut.of(state, candidate=CandidateOut.of(beside) if beside else None)


def _parse(channels: str) -> list[ChannelName]:
    """Parses the names of channels. Raises Usage for any other name, and for too many."""
    names: dict[ChannelName, None] = {}
    for text in filter(None, map(str.strip, channels.split(","))):
        reference = parse_reference(text)
        if reference.channel is None:
            raise Usage("bad_channels", f"{text[:200]!r} names no channel.", subject=text[:200])
        names[ChannelName(reference.repository, reference.channel)] = None
    if not 1 <= len(names) <= MAX_FOLLOWED:
        raise Usage(
            "bad_channels",
            f"{len(names)} channels are named, and 1 to {MAX_FOLLOWED} can be followed at once.",
            subject="channels",
        )
    return list(names)
