"""Digests of files and of a checkpoint's weights: streamed, in threads (hashlib releases the interpreter lock)."""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from composer.errors import Mismatch, RefusedOutput
from composer.formats.checkpoints.checkpoint import Architecture, Checkpoint
from composer.formats.checkpoints.files import LocalFile, StoredFile
from composer.formats.checkpoints.header import TensorEntry

_BLOCK_BYTES = 1 << 20  # measured: 64 KiB to 4 MiB all hash at the speed of sha256sum
_REMOTE_BLOCK_BYTES = 8 << 20  # a request each
_REMOTE_READERS = 8  # they wait for answers, not for cores

Progress = Callable[[int], None]
Identity = tuple[int, int, int]
"""Size, inode and modification time: while they are the same, nobody has written to the file."""


@dataclass(frozen=True, slots=True)
class BaseIdentity:
    """The identity of a base, independent of sharding, file order and file metadata. Sizes count tensors, not files."""

    weights_digest: str
    architecture_digest: str
    tensor_hashes: dict[str, str]
    parameters: int
    size_bytes: int


def identity(path: Path) -> Identity:
    status = path.stat()
    return status.st_size, status.st_ino, status.st_mtime_ns


def identities(paths: Iterable[Path]) -> dict[Path, Identity]:
    """The identities of those that are files."""
    return {path: identity(path) for path in paths if path.is_file()}


def refuse_changed(inputs: Mapping[Path, Identity]) -> None:
    """Raises RefusedOutput naming the files that were changed or removed since their identities were taken."""
    changed = [path for path, before in inputs.items() if not path.is_file() or identity(path) != before]
    if changed:
        raise RefusedOutput(
            "inputs_changed",
            f"{' and '.join(map(str, changed))} changed since this began.",
            subject=str(changed[0]),
        )


def hash_checkpoint(
    checkpoint: Checkpoint, progress: Progress | None = None, workers: int | None = None
) -> BaseIdentity:
    """Identity of the checkpoint. `progress` is called, from several threads, with each number of bytes hashed.

    Memory is one block per worker. Raises InvalidFile when a shard became shorter since it was opened, and what
    `progress` raises.
    """
    tensors = [
        (checkpoint.files[shard], entry)
        for shard, header in checkpoint.shards.items()
        for entry in header.tensors.values()
    ]
    # The largest first: one thread hashes a tensor, and a big one begun last would leave the others idle.
    tensors.sort(key=lambda tensor: -tensor[1].size_bytes)
    usual = min(32, os.cpu_count() or 1) if checkpoint.is_local else _REMOTE_READERS
    with ThreadPoolExecutor(workers or usual, "hash") as pool:
        jobs = [pool.submit(hash_tensor, file, entry, progress) for file, entry in tensors]
        try:
            hashes = [job.result() for job in jobs]
        finally:
            pool.shutdown(cancel_futures=True)  # cancelled: do not wait for terabytes
    tensor_hashes = {entry.name: digest for (_, entry), digest in zip(tensors, hashes, strict=True)}
    architecture = checkpoint.architecture
    specs = architecture.tensors.values()
    table = ((name, spec.dtype, spec.shape, tensor_hashes[name]) for name, spec in architecture.tensors.items())
    return BaseIdentity(
        weights_digest=weights_digest(table),
        architecture_digest=architecture_digest(architecture),
        tensor_hashes=tensor_hashes,
        parameters=sum(spec.elements for spec in specs),
        size_bytes=sum(spec.size_bytes for spec in specs),
    )


def verify_checkpoint(checkpoint: Checkpoint, expected: str, progress: Progress | None = None) -> None:
    """Raises Mismatch if the weights on disk no longer have the digest. `progress` as for hashing."""
    if hash_checkpoint(checkpoint, progress).weights_digest != expected:
        raise Mismatch(
            "base_changed",
            f"{checkpoint.path} does not hold the weights of the base {expected[:12]}.",
            subject=str(checkpoint.path),
        )


def weights_digest(table: Iterable[tuple[str, str, tuple[int, ...], str]]) -> str:
    """sha256 of a base's tensor table, rows (name, safetensors dtype, shape, sha256 of the raw bytes) in any order.
    Each row is the line `name TAB dtype TAB shape TAB hash`, sorted by name, so that sharding and file order do not
    matter."""
    rows = sorted(table)
    return _digest(f"{name}\t{dtype}\t{_joined(shape)}\t{digest}" for name, dtype, shape, digest in rows)


def architecture_digest(architecture: Architecture) -> str:
    """sha256 of the model type and every tensor's name and shape: the same for every fine-tune and cast of a model."""
    lines = (f"{name}\t{_joined(architecture.tensors[name].shape)}" for name in sorted(architecture.tensors))
    return _digest([architecture.model_type, *lines])


def hash_file(path: Path, progress: Progress | None = None) -> str:
    """sha256 of a file in hex. Raises OSError if it cannot be read."""
    file = LocalFile(path)
    return _hash_range(file, 0, file.size_bytes, progress)


def hash_tensor(file: StoredFile, entry: TensorEntry, progress: Progress | None = None) -> str:
    """sha256 of a tensor's raw bytes, in hex. Raises InvalidFile if its file has become shorter."""
    return _hash_range(file, entry.begin, entry.end, progress)


def _hash_range(file: StoredFile, begin: int, end: int, progress: Progress | None) -> str:
    digest = hashlib.sha256()
    most = _BLOCK_BYTES if isinstance(file, LocalFile) else _REMOTE_BLOCK_BYTES
    block = memoryview(bytearray(min(most, end - begin)))
    while begin < end:
        part = block[: end - begin]
        file.read_into(part, begin)
        digest.update(part)
        begin += part.nbytes
        if progress is not None:
            progress(part.nbytes)
    return digest.hexdigest()


def _joined(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _digest(lines: Iterable[str]) -> str:
    """sha256 of the lines, each ended by a newline, as `sha256sum` would see them in a file."""
    return hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()
