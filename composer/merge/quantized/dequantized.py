"""A quantized checkpoint as an ordinary one: which tensors are decoded, and which disappear."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from composer.errors import NotSupported
from composer.formats.checkpoints.checkpoint import DEQUANTIZE, Checkpoint, quantization
from composer.formats.checkpoints.header import TensorSpec
from composer.formats.checkpoints.quantized import NF4_STATE, is_part
from composer.merge.io.source import Decoded
from composer.merge.quantized import fp8, nf4

_INTEGERS = frozenset({"U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "F4", "F6_E2M3", "F6_E3M2"})
# Names that tools use beside, or instead of, a packed weight. No buffer of a model has such a name.
_PARTS = (
    "_packed", ".weight_shape", ".weight_scale", ".weight_scale_inv", ".weight_scale_2", ".weight_zero_point",
    ".weight_g_idx", ".SCB", ".weight_format", ".qweight", ".qzeros", ".g_idx", ".absmax", ".quant_map", ".bitmask",
    "_proj_blocks", "_proj_scales", "_proj_scale", "_proj_scale_inv",
)  # fmt: skip
_STATE = ".quant_state."


@dataclass(frozen=True, slots=True)
class Dequantized:
    """`tensors` are decoded, by name; `scales` are dropped from the output; `config` does not mention them."""

    tensors: Mapping[str, Decoded]
    scales: frozenset[str]
    config: dict[str, Any]


def dequantized(checkpoint: Checkpoint) -> Dequantized:
    """The quantized tensors of a checkpoint, decoded; empty unless it was opened with `dequantize`.

    Raises NotSupported naming an fp8 tensor without a scale or with one that does not fit, or a quantized tensor
    without a decoder: copied, it would be packed values in a checkpoint whose config does not mention packing. Also
    raises NotSupported if nothing is quantized, since another base may be meant.
    """
    config = dict(checkpoint.config)
    if not checkpoint.dequantize:
        _refuse_left(checkpoint, frozenset())
        return Dequantized({}, frozenset(), config)
    tensors, scales = fp8.decoded(checkpoint)
    tensors |= {name: nf4.decoded(checkpoint.locate, packed) for name, packed in checkpoint.packed.items()}
    if checkpoint.packed:
        scales |= {name for header in checkpoint.shards.values() for name in header.tensors if is_part(name)}
    _refuse_left(checkpoint, scales | tensors.keys())
    if not tensors:
        message = f"{checkpoint.path.name} has no weights in 4 bits, and none in fp8 with a scale."
        next_step = "Leave out --dequantize, or name the quantized base."
        raise NotSupported("not_quantized", message, subject=checkpoint.path.name, next_step=next_step)
    config.pop("quantization_config", None)
    return Dequantized(tensors, frozenset(scales), config)


def _refuse_left(checkpoint: Checkpoint, used: frozenset[str] | set[str]) -> None:
    """Raises NotSupported for a quantized tensor that no decoder used, even if the config does not mention it."""
    left = {
        name: entry.spec
        for header in checkpoint.shards.values()
        for name, entry in header.tensors.items()
        if name not in used and _is_quantized(name, entry.spec)
    }
    if not left:
        return
    name = max(left, key=lambda one: left[one].size_bytes)  # prefers a weight to its auxiliary tensors
    settings = cast("dict[str, Any]", checkpoint.config.get("quantization_config") or {})
    how = quantization(settings) if settings else "its config does not describe it"
    out = f", {DEQUANTIZE}." if _decodable(checkpoint) else "."
    raise NotSupported(
        "quantized_base",
        f"{checkpoint.path.name} is quantized ({how}): {name} ({left[name].dtype}) would stay packed.",
        subject=name,
        next_step=f"Merge into the full-precision base{out}",
    )


def _decodable(checkpoint: Checkpoint) -> bool:
    """Whether opening the checkpoint with `dequantize` might help."""
    stored = checkpoint.architecture.tensors.items()
    return not checkpoint.dequantize and any(
        name.endswith(NF4_STATE) or spec.dtype.startswith("F8_E") for name, spec in stored
    )


def _is_quantized(name: str, spec: TensorSpec) -> bool:
    """Whether a tensor is quantized. The dtype decides only for weight matrices: masks, positions and counters are
    integers too. Weights that are merely cast to fp8 have no scale and need no decoding."""
    return name.endswith(_PARTS) or _STATE in name or (name.endswith(".weight") and spec.dtype in _INTEGERS)
