"""The memory left to a process in control groups of either version, from files as the kernel writes them."""

from pathlib import Path

import psutil

from composer.evaluation.memory import free_bytes, left_by_groups

GB = 1 << 30
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")


def group(directory: Path, files: tuple[str, str, str], limit: object, usage: int, cache: int = 0) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, value in zip(files, (limit, usage), strict=False):
        (directory / name).write_text(f"{value}\n")
    (directory / "memory.stat").write_text(f"anon {usage - cache}\n{files[2]} {cache}\n")


def test_the_tightest_group_decides_and_its_cache_makes_room(tmp_path: Path) -> None:
    group(tmp_path / "pods", V2, 8 * GB, 7 * GB)
    group(tmp_path / "pods/one", V2, 4 * GB, 4 * GB, cache=3 * GB)
    group(tmp_path / "pods/one/process", V2, "max", 4 * GB)
    assert list(left_by_groups("0::/pods/one/process\n", tmp_path)) == [3 * GB, GB]


def test_the_first_version_has_a_tree_of_its_own_for_memory(tmp_path: Path) -> None:
    group(tmp_path / "memory/job", V1, 4 * GB, GB, cache=GB // 2)
    listing = "9:name=systemd:/\n4:cpu,memory:/job\n2:cpuacct:/job\n0::/\n"
    assert list(left_by_groups(listing, tmp_path)) == [3.5 * GB]


def test_in_a_container_the_path_may_be_the_hosts_and_the_group_is_where_it_is_mounted(tmp_path: Path) -> None:
    group(tmp_path, V2, 2 * GB, GB)
    assert list(left_by_groups("0::/kubepods/pod1/container\n", tmp_path)) == [GB]
    assert list(left_by_groups("0::/../../container\n", tmp_path))[-1] == GB


def test_without_groups_there_is_what_the_machine_has_free(tmp_path: Path) -> None:
    assert list(left_by_groups("0::/\n", tmp_path)) == []
    assert list(left_by_groups("", tmp_path)) == []
    assert 0 <= free_bytes() <= psutil.virtual_memory().total
