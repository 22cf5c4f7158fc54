"""Concurrent writes to one file, past the page cache and through it."""

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from composer.merge.io.output_file import BLOCK_BYTES, OutputFile

cuts = st.lists(st.integers(0, 12 * BLOCK_BYTES), min_size=2, max_size=12, unique=True).map(sorted)


def placed(data: bytes, offset: int) -> np.ndarray:
    """The bytes in memory, aligned in a block as they will be in the file."""
    room = np.zeros(len(data) + BLOCK_BYTES, np.uint8)
    first = (offset - room.ctypes.data) % BLOCK_BYTES
    room[first : first + len(data)] = np.frombuffer(data, np.uint8)
    return room[first : first + len(data)]


def written(path: Path, data: bytes, parts: list[tuple[int, int]], direct: bool) -> OutputFile:
    with ExitStack() as stack:
        target = OutputFile.opened(path, True, os.fdatasync, stack)
        if not direct:
            target.direct = None

        def write(part: tuple[int, int]) -> None:
            array = placed(data[slice(*part)], part[0])
            target.write(array.data, part[0], array.ctypes.data)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(write, parts))
        return target


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=cuts, seed=st.integers(0, 9), direct=st.booleans())
def test_pieces_of_any_size_written_by_several_threads_make_the_file(
    tmp_path: Path, cuts: list[int], seed: int, direct: bool
) -> None:
    data = bytes(cuts[0]) + np.random.default_rng(seed).bytes(cuts[-1] - cuts[0])
    path = tmp_path / "file"
    path.unlink(missing_ok=True)
    written(path, data, list(pairwise(cuts)), direct)
    assert path.read_bytes() == data


def test_whole_blocks_pass_by_the_page_cache_and_only_the_rest_is_counted_as_cached(tmp_path: Path) -> None:
    first, last = 100, 5 * BLOCK_BYTES + 7
    target = written(tmp_path / "file", bytes(last), [(first, last)], direct=True)
    if target.direct is None:
        pytest.skip("this file system has no direct writes")
    assert target.unsynced == (BLOCK_BYTES - first) + 7


def test_memory_that_lies_otherwise_than_the_file_goes_through_the_page_cache(tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes(3 * BLOCK_BYTES)
    with ExitStack() as stack:
        target = OutputFile.opened(tmp_path / "file", True, os.fdatasync, stack)
        array = placed(data, 8)
        target.write(array.data, 0, array.ctypes.data)
        assert target.unsynced == len(data)
    assert (tmp_path / "file").read_bytes() == data


def test_a_disk_with_larger_blocks_is_written_through_the_page_cache(tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes(2 * BLOCK_BYTES + 8)
    with ExitStack() as stack:
        target = OutputFile.opened(tmp_path / "file", True, os.fdatasync, stack)
        array = placed(data, 8)
        # The kernel's error for a disk with larger blocks is the same as for misaligned memory.
        target.write(array.data, 0, 0)
        assert target.unsynced == (len(data) if target.direct is None else 8)
    assert (tmp_path / "file").read_bytes() == data


def test_bytes_are_taken_to_the_disk_as_they_come(tmp_path: Path) -> None:
    synced: list[int] = []
    with ExitStack() as stack:
        target = OutputFile.opened(tmp_path / "file", True, synced.append, stack)
        for _ in range(5):
            target.cached(32 << 20)
        assert synced == [target.file, target.file]


def test_a_file_that_an_earlier_run_wrote_is_neither_written_nor_synced_again(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"finished")
    with ExitStack() as stack:
        target = OutputFile.opened(tmp_path / "file", False, lambda file: pytest.fail("synced"), stack)
        target.cached(1 << 30)
        assert target.direct is None
