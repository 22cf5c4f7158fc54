"""Models that a process keeps between the units that it runs: the base once, however many units measure on it."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer.formats.checkpoints.checkpoint import Checkpoint, open_checkpoint
from composer.formats.checkpoints.hashing import verify_checkpoint
from registry.errors import NotFound
from registry.formats.manifest import ManifestFile
from registry.formats.references import Digest
from registry.hub_client.bases import find_base
from registry.worker.engine.protocol import Needs

if TYPE_CHECKING:
    from composer.evaluation.model import LoadedModel

_LOAD_SHARE = 1.25
"""Memory of a loaded model and its passes, as a multiple of its tensors."""
_REMOTE = ("hf://", "s3://")

Row = dict[str, Any]


def base_hints(locations: Sequence[str], size_bytes: int) -> Row:
    """Where a unit finds a base."""
    return {"locations": list(locations), "size_bytes": size_bytes}


def needs_of_model(digest: str | None, hints: Mapping[str, Any]) -> Needs:
    """The needs of a unit that loads the base, or a model of its size for None. A base without an address that every
    node reaches is only on nodes that say that they have it."""
    everywhere = any(url.startswith(_REMOTE) for url in hints["locations"])
    memory = int(hints["size_bytes"] * _LOAD_SHARE)
    return Needs(device_bytes=memory, base=None if everywhere else digest)


def loaded_base(digest: str, hints: Mapping[str, Any]) -> "LoadedModel":
    """The base, loaded once by this process. Raises as `base_checkpoint` and `load_model` do."""
    return _loaded(base_checkpoint(digest, hints).path)


@lru_cache(maxsize=1)
def _loaded(directory: Path) -> "LoadedModel":
    from composer.evaluation.model import load_model

    return load_model(directory)


def base_checkpoint(digest: str, hints: Mapping[str, Any]) -> Checkpoint:
    """The base's checkpoint on this host, with its weights verified once by this process: the files at a location may
    have changed. Raises NotFound with `base_not_here`."""
    return _verified(digest, tuple(hints["locations"]), int(hints["size_bytes"]))


@lru_cache(maxsize=1)
def _verified(digest: str, locations: tuple[str, ...], size_bytes: int) -> Checkpoint:
    directory, reasons = find_base(locations, size_bytes)
    if directory is None:
        missing = f"This node cannot find the base at any location ({', '.join(locations) or 'it has none'})."
        raise NotFound(
            "base_not_here",
            " ".join([missing, *reasons]),
            subject=digest,
            next_step="Start the node with the resource of the bases that it has, or add an hf:// address.",
        )
    checkpoint = open_checkpoint(directory)
    verify_checkpoint(checkpoint, digest)
    return checkpoint


def to_rows(files: Sequence[ManifestFile]) -> list[list[Any]]:
    """Files as units name them."""
    return [[file.path, file.size_bytes, file.sha256] for file in files]


def from_rows(rows: Sequence[Sequence[Any]]) -> list[ManifestFile]:
    """The files that `to_rows` named."""
    return [ManifestFile(path, size_bytes, Digest(sha256)) for path, size_bytes, sha256 in rows]
