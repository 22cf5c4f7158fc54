"""Models that a process keeps between units: the base is loaded once, however many units measure on it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from composer.formats.checkpoints.checkpoint import Checkpoint
from registry.formats.addresses import HUB_SCHEME, S3_SCHEME
from registry.worker.engine.protocol import Needs
from registry.worker.engine.units import BaseHints, Node

if TYPE_CHECKING:
    from composer.evaluation.model import LoadedModel

PROCESS_BYTES = 1 << 30
"""A unit's memory besides the model: torch, read-ahead, parts in transit and the factors of a few tensors."""
_LOAD_SHARE = 1.25
"""Memory of a loaded model and its passes, as a multiple of its tensors."""
_REMOTE = (HUB_SCHEME, S3_SCHEME)


WITHOUT_MODEL = Needs(memory_bytes=PROCESS_BYTES)
"""The needs of a unit that loads no model."""


def base_hints(locations: Sequence[str], size_bytes: int) -> BaseHints:
    """Builds the hints by which a unit finds a base."""
    return {"locations": list(locations), "size_bytes": size_bytes}


def everywhere(hints: BaseHints) -> bool:
    """Whether every node can get the base; otherwise only those that declare it can."""
    return any(url.startswith(_REMOTE) for url in hints["locations"])


def needs_of_model(digest: str | None, hints: BaseHints) -> Needs:
    """The needs of a unit that loads the base; for None, another model of that size."""
    memory = int(hints["size_bytes"] * _LOAD_SHARE)
    return Needs(memory_bytes=PROCESS_BYTES, device_bytes=memory, base=None if everywhere(hints) else digest)


def loaded_base(node: Node, digest: str, hints: BaseHints) -> "LoadedModel":
    """Loads the base, once per process. Raises as `base_checkpoint` and `load_model` do."""
    from composer.evaluation.model import load_model

    return node.kept("model", digest, lambda: load_model(base_checkpoint(node, digest, hints).path))


def base_checkpoint(node: Node, digest: str, hints: BaseHints) -> Checkpoint:
    """Opens the base's checkpoint on this host. Verifies the weights once per process, since the files at a location
    may have changed. Raises NotFound with `base_not_here`, and Mismatch with `base_changed`."""
    where = hints["locations"], hints["size_bytes"]
    return node.kept("base", digest, lambda: node.bases.open_verified(digest, *where, node.check))


def opened_checkpoint(node: Node, digest: str, hints: BaseHints) -> Checkpoint:
    """Opens the base's checkpoint on this host, downloading it if needed. Does not verify weights. Raises NotFound with
    `base_not_here`."""
    return node.bases.open(digest, hints["locations"], hints["size_bytes"], lambda: node.check(0))
