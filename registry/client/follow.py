"""Follows what channels serve, through outages and restarts of the server."""

import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from registry.client.api import Api, read, understood
from registry.errors import Unavailable, Usage
from registry.formats.references import parse_channel_reference
from registry.wire.quality import MAX_FOLLOWED, FollowedOut, FollowOut

PATH = "/v1/follow"
PAUSES_S = (0.5, 1.0, 2.0, 5.0, 10.0)
"""Pauses between attempts to connect; the last one is repeated. Each is varied by half its length, so that the
followers of a restarting server do not reconnect all at once."""
States = Mapping[str, FollowedOut | None]


@dataclass(frozen=True, slots=True)
class ChannelChange:
    """REPO@CHANNEL serves `now`, and served `before` until then. None stands for a channel that does not exist or may
    not be read. The first changes have no `before`."""

    channel: str
    before: FollowedOut | None
    now: FollowedOut | None


def channel_names(channels: Sequence[str]) -> list[str]:
    """The channels as REPO@CHANNEL, each once. Raises Usage for a name that is not of a channel, and for more than can
    be followed at once."""
    names = list(dict.fromkeys("@".join(map(str, parse_channel_reference(name))) for name in channels))
    if len(names) > MAX_FOLLOWED:
        detail = f"{len(names):,} channels are named, and at most {MAX_FOLLOWED} can be followed at once."
        raise Usage("bad_channels", detail, subject="channels", next_step="Split them among several commands.")
    return names


def follow(
    api: Api, channels: Sequence[str], on_outage: Callable[[Unavailable | None], None] = lambda _error: None
) -> Iterator[ChannelChange]:
    """Yields what each of the channels serves, then every change, endlessly.

    `on_outage` is called with the error when the registry becomes unreachable, and with None when it is back. Then each
    channel that has changed meanwhile is yielded once. Raises Usage as `channel_names` does, and the registry's errors
    other than Unavailable, such as that for a revoked token.
    """
    names = channel_names(channels)
    known: States | None = None
    for states in _states(api, names, on_outage):
        for name in names:
            before, now = known.get(name) if known else None, states.get(name)
            if known is None or before != now:
                yield ChannelChange(name, before, now)
        known = states


def _states(api: Api, names: Sequence[str], on_outage: Callable[[Unavailable | None], None]) -> Iterator[States]:
    seen: str | None = None
    failures = 0
    while True:
        try:
            for event_id, text in api.events(PATH, seen, channels=",".join(names)):
                if failures:
                    on_outage(None)
                seen, failures = event_id, 0
                with understood(PATH):
                    document = json.loads(text)
                yield read(FollowOut, PATH, document).channels
        except Unavailable as error:
            if not failures:
                on_outage(error)
            failures += 1
        # A server that stops ends its streams.
        time.sleep(PAUSES_S[min(failures, len(PAUSES_S) - 1)] * random.uniform(0.5, 1.5))  # noqa: S311
