"""A base in llama.cpp's format, GGUF: what the conversion of an adapter reads of its header, in the names of a
checkpoint."""

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from composer.errors import InvalidFile, NotSupported
from composer.formats.checkpoints.checkpoint import Architecture, open_checkpoint
from composer.formats.checkpoints.header import TensorSpec
from composer.formats.untrusted import refuse_endless

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""llama.cpp's name of each model type. It stores Mistral as Llama."""
PROJECTIONS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
_OF_LAYERS = {theirs: ours for ours, theirs in (PROJECTIONS | _NORMS).items()}
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_TENSOR = re.compile(r"(?:blk\.([0-9]+)\.)?(\w+)\.(weight|bias)")
_DTYPES = {0: "F32", 1: "F16", 30: "BF16"}
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_ROWS, _MAX_TEXT_BYTES = 1 << 20, 1 << 24


@dataclass(frozen=True, slots=True)
class GgufBase:
    """A base as llama.cpp sees it. `quantized`: a matrix has another type than float32, float16 or bfloat16; its
    `architecture` then has F16 for it."""

    architecture: Architecture
    heads: int
    kv_heads: int
    quantized: bool = False


def open_gguf_base(path: Path) -> GgufBase:
    """Reads the header of a GGUF file, or the checkpoint in a directory.

    Raises InvalidFile for a damaged file or checkpoint, NotSupported for a model type whose adapters cannot be
    converted here.
    """
    if path.is_dir():
        checkpoint = open_checkpoint(path)
        _refuse_unknown(checkpoint.architecture.model_type)
        heads = int(checkpoint.config["num_attention_heads"])
        return GgufBase(checkpoint.architecture, heads, int(checkpoint.config.get("num_key_value_heads") or heads))
    try:
        refuse_endless(path)
        with path.open("rb") as file:
            values, tensors = _read_header(file)
        model_type = str(values["general.architecture"])
        _refuse_unknown(model_type)
        heads = int(values[f"{model_type}.attention.head_count"])
        kv_heads = int(values.get(f"{model_type}.attention.head_count_kv", heads))
        if heads < 1 or kv_heads < 1:
            raise ValueError("a count of heads is not positive")
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        message = f"{path} cannot be read as the GGUF file of a base: {error}."
        raise InvalidFile("unreadable", message, subject=str(path)) from error
    named = {name: TensorSpec(_DTYPES.get(kind, "F16"), shape) for name, (kind, shape) in _renamed(tensors).items()}
    architecture = Architecture(model_type, "lm_head.weight" not in named, named)
    return GgufBase(architecture, heads, kv_heads, any(kind not in _DTYPES for kind, _ in tensors.values()))


def _refuse_unknown(model_type: str) -> None:
    if model_type not in ARCHITECTURES:
        message = f"The conversion to GGUF knows {', '.join(ARCHITECTURES)}, and the base is {model_type}."
        raise NotSupported("gguf_model", message, subject=model_type)


_Tensors = Mapping[str, tuple[int, tuple[int, ...]]]
"""The type and shape of each tensor."""


def _renamed(tensors: _Tensors) -> _Tensors:
    """The tensors under their names in a checkpoint. Those that a checkpoint does not have, such as frequencies of
    rotary embeddings, are left out."""
    renamed: dict[str, tuple[int, tuple[int, ...]]] = {}
    for name, row in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match and match[1] is None and match[2] in _OUTER:
            renamed[f"{_OUTER[match[2]]}.{match[3]}"] = row
        elif match and match[1] is not None and match[2] in _OF_LAYERS:
            renamed[f"model.layers.{match[1]}.{_OF_LAYERS[match[2]]}.{match[3]}"] = row
    return renamed


def _read_header(file: BinaryIO) -> tuple[Mapping[str, Any], _Tensors]:
    """The metadata, with None for arrays, and the tensors."""
    if file.read(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version, tensor_count, value_count = struct.unpack("<IQQ", file.read(20))
    if version not in (2, 3) or max(tensor_count, value_count) > _MAX_ROWS:
        raise ValueError(f"version {version}, {tensor_count} tensors, {value_count} values")
    values = {_text(file): _value(file, _number(file, "I")) for _ in range(value_count)}
    tensors: dict[str, tuple[int, tuple[int, ...]]] = {}
    for _ in range(tensor_count):
        name, dimensions = _text(file), _number(file, "I")
        if dimensions > 4:
            raise ValueError(f"{name} has {dimensions} dimensions")
        shape = tuple(_number(file, "Q") for _ in range(dimensions))[::-1]  # the innermost dimension is first there
        kind = _number(file, "I")
        _number(file, "Q")
        if not 0 < prod(shape) < 1 << 48:
            raise ValueError(f"{name} has the shape {shape}")
        tensors[name] = (kind, shape)
    return values, tensors


def _number(file: BinaryIO, form: str) -> Any:
    return struct.unpack(f"<{form}", file.read(struct.calcsize(f"<{form}")))[0]


def _text(file: BinaryIO) -> str:
    size = _number(file, "Q")
    if size > _MAX_TEXT_BYTES:
        raise ValueError(f"a text of {size:,} bytes")
    return file.read(size).decode()


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _text(file)
    if kind != _ARRAY:
        return _number(file, _FORMATS[kind])
    of, count = struct.unpack("<IQ", file.read(12))
    if of == _STRING:
        for _ in range(min(count, _MAX_TEXT_BYTES)):
            _text(file)
    else:
        file.seek(count * struct.calcsize(f"<{_FORMATS[of]}"), 1)
    return None
