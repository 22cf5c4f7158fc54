"""Results of units of work, by a key of what determines them: what one process finished, no other does again.

They are small JSON documents in the blob store's directory or bucket, under `work/`. The bytes that a unit makes are
blobs.
"""

from datetime import datetime
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Protocol

from composer.formats.checkpoints.staging import sync
from registry.storage.local import remove_stale

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


class LocalResults:
    """One file per result, which every process of the host, or of a shared file system, can read."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory / WORK

    def read(self, key: str) -> bytes | None:
        try:
            with self._path(key).open("rb") as file:
                return file.read(MAX_RESULT_BYTES)
        except FileNotFoundError:
            return None

    def write(self, key: str, content: bytes) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=self._directory, prefix=".", delete=False) as file:
            staged = Path(file.name)
        try:
            staged.write_bytes(content)
            sync(staged)
            staged.replace(self._path(key))
        finally:
            staged.unlink(missing_ok=True)

    def delete(self, key: str) -> None:
        self._path(key).unlink(missing_ok=True)

    def sweep(self, before: datetime) -> int:
        return remove_stale(self._directory.glob("*"), before)

    def _path(self, key: str) -> Path:
        return self._directory / f"{key}.json"
