"""Files of units: named by rows of JSON, read from the store and written to it. Nodes have no database."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from composer.formats.checkpoints.hashing import hash_file
from registry.formats.manifest import ManifestFile
from registry.formats.references import Digest
from registry.transfer.publishing import materialise
from registry.worker.engine.units import Node

Row = dict[str, Any]


def to_rows(files: Sequence[ManifestFile]) -> list[list[Any]]:
    """Files as units name them."""
    return [[file.path, file.size_bytes, file.sha256] for file in files]


def from_rows(rows: Sequence[Sequence[Any]]) -> list[ManifestFile]:
    """The files that `to_rows` named."""
    return [ManifestFile(path, size_bytes, Digest(sha256)) for path, size_bytes, sha256 in rows]


def are_stored(node: Node, files: Sequence[ManifestFile]) -> bool:
    """Whether the store has all of the files, as far as their sizes tell."""
    stored = [node.store.stat(file.sha256) for file in files]
    return all(one and one.size_bytes == file.size_bytes for one, file in zip(stored, files, strict=True))


def member_directory(node: Node, directory: Path, member: Mapping[str, Any]) -> Path:
    """An adapter's directory below `directory`, filled from the store. Its name, which is the member's, ends up in
    adaptory.json."""
    own = directory / "inputs" / member["name"]
    materialise(node.store, from_rows(member["files"]), own)
    return own


def store_directory(node: Node, directory: Path) -> list[ManifestFile]:
    """Moves the directory's files into the store, and returns them."""
    files: list[ManifestFile] = []
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        digest, size_bytes = Digest(hash_file(path)), path.stat().st_size
        files.append(ManifestFile(path.relative_to(directory).as_posix(), size_bytes, digest))
        node.store.put(digest, path, move=True)
    return files
