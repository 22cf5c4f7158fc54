"""Caches for half a minute that a store has a blob, for many clients that download one release at the same time."""

import time
from collections.abc import Callable

from registry.formats.references import Digest
from registry.storage.blobs import BlobStat, BlobStore

REMEMBERED_S = 30.0
_MOST = 10_000


class RecentStats:
    """A cache of a store's answers about existing blobs. `clock` counts seconds.

    A blob that is lost meanwhile is noticed REMEMBERED_S later; until then its address leads to the store's own 404.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: dict[Digest, tuple[float, BlobStat]] = {}

    def stat(self, store: BlobStore, sha256: Digest) -> BlobStat | None:
        """As `store.stat`. One caller renews an old answer, since a busy store may take longer than clients wait.
        Absent blobs are not remembered."""
        asked_at, known = self._known.get(sha256, (0.0, None))
        if known is not None:
            if self._clock() - asked_at < REMEMBERED_S:
                return known
            self._known[sha256] = self._clock(), known  # for the others meanwhile
        stat = store.stat(sha256)
        if len(self._known) >= _MOST:
            self._known = {}
        if stat is None:
            self._known.pop(sha256, None)
        else:
            self._known[sha256] = self._clock(), stat
        return stat
