"""Results of units of work, by a key of everything that determines them, so that finished work is not repeated by
another process.

They are small JSON documents in the blob store's directory or bucket, under `work/`. The bytes that a unit makes are
blobs.
"""

from datetime import datetime
from typing import Protocol

WORK = "work/"
MAX_RESULT_BYTES = 64 << 20
"""Limit on the size of a result: our own code writes small ones, but a store may hold anything."""


class UnitResults(Protocol):
    """The contract of a store of results. Errors: Unavailable if the store cannot be reached or is full."""

    def read(self, key: str) -> bytes | None:
        """The result under the key, up to MAX_RESULT_BYTES; None if absent."""
        ...

    def write(self, key: str, content: bytes) -> None:
        """Keeps a result, completely or not at all. The last of several writers wins: their work was the same."""
        ...

    def delete(self, key: str) -> None:
        """Removes a result, if it exists."""
        ...

    def sweep(self, before: datetime) -> int:
        """Removes the results that were written before that time. Returns their number."""
        ...
