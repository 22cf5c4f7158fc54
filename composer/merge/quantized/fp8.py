"""Decodes weights in 8-bit floats with separate scales.

W = fp8 * scale for both names of the scale: `weight_scale_inv`, one per block of a matrix (DeepSeek-V3, arXiv
2412.19437, section 3.3), or `weight_scale`, one per matrix or per row.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch

from composer.deltas.stored import stored_tensor
from composer.errors import NotSupported
from composer.formats.checkpoints.checkpoint import Checkpoint
from composer.formats.checkpoints.files import StoredFile
from composer.formats.checkpoints.header import TensorEntry
from composer.merge.io.source import Decoded

_FP8 = frozenset({"F8_E4M3", "F8_E5M2"})
_SCALES = ("_scale_inv", "_scale")
_ACTIVATION_SCALES = (".input_scale", ".input_scale_ub", ".output_scale")
_NEXT = "Use the unquantized base."


def decoded(checkpoint: Checkpoint) -> tuple[dict[str, Decoded], set[str]]:
    """(the fp8 tensors by name, the names of their scales). Raises NotSupported naming a tensor whose scale is missing
    or does not fit.
    """
    names = checkpoint.architecture.tensors
    tensors: dict[str, Decoded] = {}
    scales = {name for name in names if name.endswith(_ACTIVATION_SCALES)}
    for name, spec in names.items():
        if spec.dtype in _FP8:
            scale = next((name + suffix for suffix in _SCALES if name + suffix in names), None)
            if scale is None:
                raise NotSupported("fp8_scale", f"{name} is in fp8 and has no scale.", subject=name, next_step=_NEXT)
            tensors[name] = _decoded(checkpoint, name, scale)
            scales.add(scale)
    return tensors, scales


def _decoded(checkpoint: Checkpoint, name: str, scale_name: str) -> Decoded:
    file, entry = checkpoint.locate(name)
    scale_file, scale_entry = checkpoint.locate(scale_name)
    block = _block(checkpoint.config, entry, scale_entry)

    def rows(begin: int, end: int) -> torch.Tensor:
        values = _matrix(file, entry)[begin:end].float()
        scale = _matrix(scale_file, scale_entry).float()
        of_rows = scale[torch.arange(begin, end) // block[0]]
        return values.mul_(of_rows.repeat_interleave(block[1], dim=1)[:, : values.shape[1]])

    return Decoded((entry.shape[0], entry.shape[1]), rows)


def _matrix(file: StoredFile, entry: TensorEntry) -> torch.Tensor:
    """The scale as a matrix: a scalar is 1 x 1, and a scale per row is a column."""
    tensor = stored_tensor(file, entry)
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, 1)


def _block(config: Mapping[str, Any], entry: TensorEntry, scale: TensorEntry) -> tuple[int, int]:
    """Rows and columns covered by one scale. Raises NotSupported if weight and scale do not fit."""
    if len(entry.shape) == 2:
        rows, columns = entry.shape
        if scale.spec.elements == 1:
            return rows, columns
        if scale.shape in ((rows,), (rows, 1)):
            return 1, columns
        stated = cast("dict[str, Any]", config.get("quantization_config") or {}).get("weight_block_size")
        if isinstance(stated, list) and len(cast("list[Any]", stated)) == 2:
            height, width = cast("list[Any]", stated)
            sizes = type(height) is int and type(width) is int and min(height, width) > 0
            if sizes and scale.shape == (-(-rows // height), -(-columns // width)):
                return height, width
    message = f"{entry.name} of shape {list(entry.shape)} has a scale of shape {list(scale.shape)}, which does not fit."
    raise NotSupported("fp8_scale", message, subject=entry.name, next_step=_NEXT)
