"""The journal of a merge, in its staging directory: finished shards, so that an interrupted merge can resume.

A shard is recorded once its bytes are verified and synced (fsync), with its size, inode and ctime. A later run accepts
it if all three are unchanged, because then nobody has written to it, and verifies it again with the same checks. A
digest of every byte would add a third to each merge's time for the same answer.
"""

import json
import os
import threading
from pathlib import Path
from typing import Any

from composer.formats.checkpoints.hashing import Identity, identity
from composer.formats.checkpoints.staging import sync

JOURNAL_FILE = ".journal"


class ShardJournal:
    """The finished shards of the merge that writes into `directory`. Opening it removes all other files."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._path = directory / JOURNAL_FILE
        self._lock = threading.Lock()
        self._finished = {
            name: (then, measured)
            for name, (then, measured) in _read(self._path).items()
            if (directory / name).is_file() and identity(directory / name) == then
        }
        for file in directory.iterdir():
            if file.name not in self._finished:
                file.unlink()
        self._path.write_text("".join(_line(name, *finished) for name, finished in self._finished.items()))
        sync(self._path)
        sync(directory)

    def holds(self, name: str) -> bool:
        """Whether an earlier run or this one has finished the shard."""
        with self._lock:
            return name in self._finished

    def measured(self, name: str) -> dict[str, Any]:
        """The measurements from when the shard was written."""
        return self._finished[name][1]

    def close(self) -> None:
        """Removes the journal, before the directory becomes the output."""
        self._path.unlink()

    def finish(self, path: Path, measured: dict[str, Any]) -> None:
        """Records a shard that is verified and synced, with what was measured when it was written."""
        with self._lock, self._path.open("a", encoding="utf-8") as file:
            self._finished[path.name] = identity(path), measured
            file.write(_line(path.name, *self._finished[path.name]))
            file.flush()
            os.fsync(file.fileno())


def _line(name: str, identity: Identity, measured: dict[str, Any]) -> str:
    return json.dumps([name, *identity, measured]) + "\n"


def _read(path: Path) -> dict[str, tuple[Identity, dict[str, Any]]]:
    """The entries up to the first line damaged by a crash or power loss; later ones were never guaranteed."""
    finished: dict[str, tuple[Identity, dict[str, Any]]] = {}
    for line in path.read_text("utf-8", "replace").split("\n")[:-1] if path.is_file() else ():
        try:
            name, size, inode, changed, measured = json.loads(line)
            finished[str(name)] = (size, inode, changed), dict(measured)
        except (ValueError, TypeError):
            break
    return finished
