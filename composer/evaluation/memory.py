"""The memory that this process may still use: free on the machine and within its control groups."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

_LISTING = Path("/proc/self/cgroup")
_MOUNT = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class _Files:
    """The files of a control group: limit, usage, and the line of memory.stat with the reclaimable cache."""

    limit: str
    usage: str
    cache: str


_V1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Files("memory.max", "memory.current", "inactive_file")


def free_bytes() -> int:
    """Bytes that this process may still use, within the machine and all its control groups."""
    listing = _LISTING.read_text() if _LISTING.is_file() else ""
    return max(0, min([psutil.virtual_memory().available, *left_by_groups(listing, _MOUNT)]))


def device_bytes() -> int:
    """The memory of the device that models are loaded on: of the first CUDA device or, without one, of the machine,
    within the control groups of this process."""
    import torch  # this module is also used without it

    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    return host_bytes()


def host_bytes() -> int:
    """The memory of the machine, within the control groups of this process."""
    listing = _LISTING.read_text() if _LISTING.is_file() else ""
    groups = (_limit(group, files) for group, files in _groups(listing, _MOUNT))
    return min([psutil.virtual_memory().total, *(limit for limit in groups if limit is not None)])


def left_by_groups(listing: str, mount: Path) -> Iterator[int]:
    """The free bytes of each group that has a limit, among those in /proc/self/cgroup's `listing` and their parents."""
    for group, files in _groups(listing, mount):
        if (left := _left(group, files)) is not None:
            yield left


def _groups(listing: str, mount: Path) -> Iterator[tuple[Path, _Files]]:
    """The groups in /proc/self/cgroup's `listing`, and their parents.

    Inside a container the listing may name a path of the host, which is not below `mount`: the container's own group is
    then `mount` itself, which is included.
    """
    for line in listing.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, files = (mount / "memory", _V1) if controllers else (mount, _V2)
        group = root / path.lstrip("/")
        for directory in (group, *group.parents):
            if directory.is_relative_to(root):
                yield directory, files


def _limit(group: Path, files: _Files) -> int | None:
    """The group's limit; None if it does not exist or has none (`max`)."""
    try:
        return int((group / files.limit).read_text())
    except (OSError, ValueError):
        return None


def _left(group: Path, files: _Files) -> int | None:
    """The group's free bytes; None if it does not exist or has no limit."""
    try:
        limit, usage = (int((group / name).read_text()) for name in (files.limit, files.usage))
        counts = dict(line.split(maxsplit=1) for line in (group / "memory.stat").read_text().splitlines())
        # As Kubernetes counts: cached file pages stay in the group's usage, and are freed when needed.
        return limit - usage + int(counts.get(files.cache, 0))
    except (OSError, ValueError):
        return None
