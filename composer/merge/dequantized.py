"""A quantized checkpoint as the ordinary one that it stands for: which tensors are decoded, and which disappear."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from composer.formats.checkpoint import Checkpoint
from composer.formats.quantized import is_part
from composer.merge import fp8, nf4
from composer.merge.source import Decoded


@dataclass(frozen=True, slots=True)
class Dequantized:
    """`tensors` are decoded by name, `scales` have no place in the output, and `config` does not speak of them."""

    tensors: Mapping[str, Decoded]
    scales: frozenset[str]
    config: dict[str, Any]


def dequantized(checkpoint: Checkpoint) -> Dequantized:
    """What the quantized tensors of a checkpoint stand for; nothing unless it was opened with `dequantize`.

    Raises NotSupported naming an fp8 tensor without a scale, or one whose scale does not fit it.
    """
    config = dict(checkpoint.config)
    if not checkpoint.dequantize:
        return Dequantized({}, frozenset(), config)
    tensors, scales = fp8.decoded(checkpoint)
    tensors |= {name: nf4.decoded(checkpoint, packed) for name, packed in checkpoint.packed.items()}
    if checkpoint.packed:
        scales |= {name for header in checkpoint.shards.values() for name in header.tensors if is_part(name)}
    config.pop("quantization_config", None)
    return Dequantized(tensors, frozenset(scales), config)
