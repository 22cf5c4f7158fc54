"""Reads and writes the files of units, which JSON rows describe, since nodes have no database."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from composer.formats.checkpoints.checkpoint import Architecture
from composer.formats.checkpoints.header import TensorSpec
from registry.formats.manifest import ManifestFile
from registry.formats.references import Digest
from registry.transfer.publishing import materialise
from registry.worker.engine.units import HostNode, Node

if TYPE_CHECKING:
    from composer.deltas.variants.load import LoadedAdapter

Row = dict[str, Any]


class MemberRow(TypedDict):
    """An adapter in a unit's content: its files as `to_rows` makes them, and its weight as JSON."""

    name: str
    weight: Any
    files: list[list[Any]]


class FilesRow(TypedDict):
    """The result of a unit: files that it stored."""

    files: list[list[Any]]


def to_rows(files: Sequence[ManifestFile]) -> list[list[Any]]:
    """Serializes files for units."""
    return [[file.path, file.size_bytes, file.sha256] for file in files]


def from_rows(rows: Sequence[Sequence[Any]]) -> list[ManifestFile]:
    """Reverses `to_rows`."""
    return [ManifestFile(path, size_bytes, Digest(sha256)) for path, size_bytes, sha256 in rows]


def are_stored(node: Node, files: Sequence[ManifestFile]) -> bool:
    """Whether the store has all files; compares sizes, not contents."""
    return all(node.store.size_of(file.sha256) == file.size_bytes for file in files)


def files_are_stored(node: Node, result: FilesRow) -> bool:
    """The `intact` of tasks that store files."""
    return are_stored(node, from_rows(result["files"]))


def fetched(node: Node, rows: Sequence[Sequence[Any]], name: str = "files") -> Path:
    """Returns a directory with the files in `rows`, written once per process. Its `name` is recorded in the
    adaptory.json of anything made from an adapter."""
    key = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
    directory = node.kept_directory(f"files-{key}") / name
    materialise(node.store, from_rows(rows), directory)
    return directory


def loaded_adapter(node: Node, member: MemberRow, architecture: Architecture) -> "LoadedAdapter":
    """Loads the adapter from a member's `files`, under the member's `name`."""
    from composer.deltas.variants.load import load_deltas

    return replace(load_deltas(fetched(node, member["files"]), architecture), name=member["name"])


def store_directory(node: Node, directory: Path) -> list[ManifestFile]:
    """Moves the directory's files into the store, and returns them."""
    files: list[ManifestFile] = []
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        size_bytes = path.stat().st_size
        files.append(ManifestFile(path.relative_to(directory).as_posix(), size_bytes, node.store.put(path)))
    return files


def share_architecture(node: HostNode, architecture: Architecture) -> str:
    """Shares a base's architecture with units that combine adapters without the base. Returns its key."""
    tensors = [[name, spec.dtype, spec.shape] for name, spec in architecture.tensors.items()]
    return node.share(json.dumps([architecture.model_type, architecture.tied, tensors]).encode())


def shared_architecture(node: Node, key: str) -> Architecture:
    """Reads the architecture that `share_architecture` stored under the key."""

    def read() -> Architecture:
        model_type, tied, tensors = json.loads(node.shared(key))
        return Architecture(model_type, tied, {name: TensorSpec(dtype, tuple(shape)) for name, dtype, shape in tensors})

    return node.kept("architecture", key, read)
