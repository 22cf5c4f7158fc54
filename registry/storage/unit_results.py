"""Results of units of work, by a key of what determines them: what one process finished, no other does again.

They are small JSON documents in the blob store's directory or bucket, under `work/`. The bytes that a unit makes are
blobs.
"""

from datetime import datetime
from typing import Protocol

WORK = "work/"
MAX_RESULT_BYTES = 64 << 20
"""Of a result: one is written by this version's own code, but a store may hold anything."""


class UnitResults(Protocol):
    """Where results are kept. Errors: Unavailable if the store is away or full."""

    def read(self, key: str) -> bytes | None:
        """The result under the key, at most MAX_RESULT_BYTES of it; None if there is none."""
        ...

    def write(self, key: str, content: bytes) -> None:
        """Keeps a result, whole or not at all. The last of several writers wins: they had the same work to do."""
        ...

    def delete(self, key: str) -> None:
        """Removes a result, if it exists."""
        ...

    def sweep(self, before: datetime) -> int:
        """Removes the results that were written before that time. Returns their number."""
        ...
