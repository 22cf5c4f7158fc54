"""The cache of bases: the least recently used entry is removed first, and entries in use stay."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from registry.storage.base_cache import BaseCache, remove_unused

USE = "import sys, pathlib; from registry.storage.base_cache import BaseCache; entry = pathlib.Path(sys.argv[1])"
USE += "; print(BaseCache(entry, None).use(entry), flush=True); sys.stdin.read()"
"""A process that uses an entry until it is ended."""


@pytest.fixture
def entries(tmp_path: Path) -> list[Path]:
    """Entries of 100 bytes each, least recently used first."""
    made: list[Path] = []
    for number in range(4):
        entry = tmp_path / f"address-{number % 2}" / f"content-{number}"
        entry.mkdir(parents=True)
        (entry / "model.safetensors").write_bytes(bytes(100))
        os.utime(entry, (number + 1, number + 1))
        made.append(entry)
    return made


def left(entries: list[Path]) -> list[int]:
    return [number for number, entry in enumerate(entries) if entry.is_dir()]


def test_what_was_used_longest_ago_makes_room(tmp_path: Path, entries: list[Path]) -> None:
    cache = BaseCache(tmp_path, 400)
    assert cache.use(entries[0])
    cache.release()
    cache.make_room(150)
    assert left(entries) == [0, 3]
    cache.make_room(200)
    assert left(entries) == [0, 3], "there is room"
    assert {path.parent for path in tmp_path.glob("*/*")} == {entries[0].parent, entries[3].parent}


def test_without_a_limit_only_a_full_disk_makes_room(
    tmp_path: Path, entries: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = BaseCache(tmp_path, None)
    cache.make_room(1000)
    assert left(entries) == [0, 1, 2, 3]
    full = type("Usage", (), {"free": 10})
    monkeypatch.setattr("shutil.disk_usage", lambda _path: full)  # pyright: ignore[reportUnknownLambdaType]
    cache.make_room(1000)
    assert left(entries) == []


def test_what_another_process_uses_stays_until_that_ends(tmp_path: Path, entries: list[Path]) -> None:
    cache = BaseCache(tmp_path, 1)
    user = subprocess.Popen(
        [sys.executable, "-c", USE, entries[0]], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert user.stdout is not None
    assert user.stdout.readline() == "True\n"
    assert cache.use(entries[1])
    cache.make_room(1)
    assert left(entries) == [0, 1], "the own one too"
    assert not remove_unused(entries[0])
    user.kill()
    user.wait()
    cache.release()
    cache.make_room(1)
    assert left(entries) == []
    assert not cache.use(entries[0])
    assert remove_unused(entries[0]), "another process may have removed it"
