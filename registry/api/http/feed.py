"""Reads everything that streams follow, once per process: jobs, compositions, and what channels serve.

Followers wait in the event loop. Every LOOK_S, the reader checks for commits. After one, it reads everything followed
in a single transaction, and wakes the followers whose subjects have changed. A follower misses no lasting state, and
receives none twice.
"""

import asyncio
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import State

from registry.database.changes import CommitWatch
from registry.database.engine import Session
from registry.errors import RegistryError, TooMany
from registry.transfer.resources import Resources

log = logging.getLogger(__name__)

LOOK_S = 0.1
Read = Callable[[Session, Sequence[Any]], Mapping[Any, Hashable]]
"""Reads the snapshots of the subjects with these names; omits those that do not exist."""
Key = tuple[Read, Hashable]


class Follower:
    """The subject of one stream. Used only in the event loop of its process."""

    def __init__(self, keys: Sequence[Key], began: int) -> None:
        self.keys, self.began = keys, began
        self.snapshots: dict[Key, Hashable | None] = {}
        """The latest snapshots by key, None for a subject that does not exist; empty before the first read."""
        self.is_lost = False
        """Whether a read has failed."""
        self._news = asyncio.Event()

    def wake(self) -> None:
        self._news.set()

    async def news(self, within_s: float) -> bool:
        """Waits until a snapshot, or perhaps the caller's rights, have changed since the last call, for at most that
        time. Returns whether they have."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._news.wait()
        has_come = self._news.is_set()
        self._news.clear()
        return has_come


class Feed:
    """Reads for all followers. Used only in its process's event loop."""

    def __init__(self, resources: Resources, state: State) -> None:
        self._resources, self._state = resources, state
        self._followers: dict[Follower, None] = {}
        self._watch = CommitWatch(resources.database)
        self._mark: Any = None
        self._reads = 0
        self._stale_since: float | None = None
        self._joined = asyncio.Event()
        self._reader: asyncio.Task[None] | None = None

    @contextmanager
    def follow(self, keys: Sequence[Key]) -> Generator[Follower]:
        """Follows these keys while the block runs. The first follower starts the reader, and the last one ends it. The
        follower's first snapshots contain everything committed before this call."""
        follower = Follower(keys, self._reads)
        self._followers[follower] = None
        self._joined.set()
        if self._reader is None or self._reader.done():
            self._reader = asyncio.create_task(self._read_on())
        try:
            yield follower
        finally:
            del self._followers[follower]

    async def _read_on(self) -> None:
        while self._followers:
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._joined.wait()
            if self._state.draining or self._may_have_lost_rights():
                for follower in self._followers:
                    follower.wake()
            try:
                await self._read()
            except Exception as error:  # ends the streams: the next request gets this error
                if not isinstance(error, RegistryError):
                    log.exception("What is followed could not be read")
                self._mark = None
                for follower in self._followers:
                    follower.is_lost = True
                    follower.wake()
        self._watch.close()
        self._mark = None

    def _may_have_lost_rights(self) -> bool:
        """Whether the followers' rights are due for another check. Tokens and roles are rows, which change only with a
        commit."""
        stale_s = time.monotonic() - (self._stale_since or time.monotonic())
        if stale_s < self._resources.settings.access_cache_s or not stale_s:
            return False
        self._stale_since = None
        return True

    async def _read(self) -> None:
        """Reads if anything was committed, or somebody has joined. The mark is from before the read, so that later
        commits cause another read."""
        mark = self._watch.mark() if self._watch.is_quick else await run_in_threadpool(self._watch.mark)
        if mark == self._mark and not self._joined.is_set():
            return
        if mark != self._mark and self._stale_since is None:
            self._stale_since = time.monotonic()
        self._joined.clear()
        self._reads += 1
        wanted = {key for follower in self._followers for key in follower.keys}
        snapshots = await run_in_threadpool(self._snapshots, wanted)
        self._mark = mark
        for follower in self._followers:
            if follower.began < self._reads:  # the read has begun after it joined
                latest = {key: snapshots.get(key) for key in follower.keys}
                if latest != follower.snapshots:
                    follower.snapshots = latest
                    follower.wake()

    def _snapshots(self, keys: set[Key]) -> dict[Key, Hashable]:
        wanted = defaultdict[Read, list[Hashable]](list)
        for read, name in keys:
            wanted[read].append(name)
        snapshots: dict[Key, Hashable] = {}
        with self._resources.snapshot() as session:
            for read, names in wanted.items():
                snapshots |= {(read, name): snapshot for name, snapshot in read(session, names).items()}
        return snapshots


class OpenStreams:
    """Counts the streams of this process. Used only in its event loop."""

    def __init__(self, per_caller: int, per_process: int) -> None:
        self._per_caller, self._per_process = per_caller, per_process
        self._open: Counter[str] = Counter()

    @contextmanager
    def one(self, caller: str) -> Generator[None]:
        """Counts a stream of this caller while the block runs. Raises TooMany at a limit."""
        self.refuse_more(caller)
        self._open[caller] += 1
        try:
            yield
        finally:
            self._open[caller] -= 1
            self._open += Counter()  # without the callers that have none

    def refuse_more(self, caller: str) -> None:
        """Raises TooMany if the caller or the process has reached its limit."""
        own, every = self._open[caller], self._open.total()
        if own >= self._per_caller or every >= self._per_process:
            raise TooMany(
                "too_many_streams",
                f"This caller has {own} event streams open, and this process {every}; the limits are "
                f"{self._per_caller} for a token (ADAPTORY_STREAMS_PER_TOKEN) and {self._per_process} for a process "
                "(ADAPTORY_STREAMS).",
            )
