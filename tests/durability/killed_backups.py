"""Backups and restores that are killed: in processes of their own, which import little."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

from registry.storage.archive import LocalArchive
from registry.transfer import backup
from tests.durability.processes import resources


class Quiet:
    """Progress that calls `each` after every blob."""

    def __init__(self, each: Callable[[], object] = lambda: None) -> None:
        self._each = each

    def __call__(self, _count: int) -> None:
        self._each()

    def expect(self, total: int) -> None:
        pass


class _Deadly(LocalArchive):
    """Kills its process when that is about to save this document."""

    last = ""

    def save(self, name: str, source: Path) -> None:
        if name.endswith(self.last):
            _die()
        super().save(name, source)


def back_up_and_die(directory: str, last: str) -> None:
    """Dies after the second blob, or before that document."""
    archive = _Deadly(Path(directory))
    archive.last = last
    left = [2]

    def count() -> None:
        left[0] -= 1
        if last == "blob" and left[0] == 0:
            _die()

    backup.back_up(resources(), archive, keep=None, read_bytes=False, progress=Quiet(count))


def restore_and_die(directory: str, last: str) -> None:
    """Dies after the first blob, or at the end, before reporting success."""
    archive, held = LocalArchive(Path(directory)), resources()
    manifest = backup.read_manifest(archive, None)
    backup.restore(
        held.database, held.store, archive, manifest, progress=Quiet(_die if last == "blob" else lambda: None)
    )
    _die()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
