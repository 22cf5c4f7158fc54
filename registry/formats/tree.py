"""A manifest as a tree of directories."""

from collections.abc import Sequence
from dataclasses import dataclass

from registry.formats.manifest import ManifestFile


@dataclass(frozen=True, slots=True)
class TreeEntry:
    """A file, or a directory if `file` is None."""

    path: str
    file: ManifestFile | None = None


def list_directory(files: Sequence[ManifestFile], directory: str, *, recursive: bool) -> list[TreeEntry]:
    """The entries of a directory ("" is the root) by path; with `recursive`, those of its subdirectories too. Empty if
    the directory does not exist."""
    prefix = f"{directory}/" if directory else ""
    entries: dict[str, TreeEntry] = {}
    for file in files:
        if file.path.startswith(prefix):
            for parent in _parents(file.path, len(prefix)):
                entries.setdefault(parent, TreeEntry(parent))
            entries[file.path] = TreeEntry(file.path, file)
    listed = (entry for path, entry in sorted(entries.items()) if recursive or "/" not in path[len(prefix) :])
    return list(listed)


def select_entries(files: Sequence[ManifestFile], paths: Sequence[str]) -> list[TreeEntry]:
    """The entries at those paths that exist, in the order of `paths`."""
    entries = {entry.path: entry for entry in list_directory(files, "", recursive=True)}
    wanted = dict.fromkeys(path.strip("/") for path in paths)
    return [entries[path] for path in wanted if path in entries]


def _parents(path: str, start: int) -> list[str]:
    """The directories of a path whose paths are longer than `start` characters."""
    return [path[:index] for index in range(start, len(path)) if path[index] == "/"]
