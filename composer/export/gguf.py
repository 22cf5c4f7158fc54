"""Writes an adapter as a GGUF LoRA, the file that llama.cpp loads beside a base, with all scales folded into B."""

import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch

from composer.deltas.delta import Delta, Layout, LowRank
from composer.deltas.variants.load import load_deltas
from composer.errors import NotSupported, RefusedOutput
from composer.export.convert import ConvertReport
from composer.formats.adapters.facts import WEIGHTS_FILE
from composer.formats.checkpoints.hashing import hash_file
from composer.formats.checkpoints.staging import NOTE_FILE, staged_directory, write_json
from composer.formats.gguf import ARCHITECTURES, PROJECTIONS, GgufBase

GGUF_FILE = "adapter.gguf"
_WEIGHT = re.compile(r"(?:model\.)?layers\.([0-9]+)\.(.+)\.weight")
_ALIGNMENT = 32
_STRING, _FLOAT32 = 8, 6  # types of metadata values
_F32 = 0  # the type of a tensor
_SPARE_BYTES = 1 << 20


def convert_to_gguf(path: Path, out_dir: Path, base: GgufBase) -> ConvertReport:
    """Writes the PEFT adapter in directory `path` as `adapter.gguf` in the new directory `out_dir`, in float32.

    B holds alpha / r (rsLoRA and patterns too), and `adapter.lora.alpha` is 0, which llama.cpp reads as a scale of 1.
    Raises NotSupported for a module without a name in llama.cpp here, and for a change that is not a low-rank pair of
    a linear layer; RefusedOutput for an existing directory and a value that is not finite; and what
    `load_deltas` raises.
    """
    architecture = ARCHITECTURES[base.architecture.model_type]
    loaded = load_deltas(path, base.architecture)
    digest = hash_file(path / WEIGHTS_FILE)
    tensors: dict[str, torch.Tensor] = {}
    rank = 0
    for delta in loaded.deltas:
        pair, name = _pair_and_name(delta)
        if f"{name}.lora_a" in tensors:
            raise NotSupported("gguf_module", f"{pair.module} has two pairs.", subject=pair.module)
        B_OR = pair.B_OR.float() * pair.scale
        if not bool(B_OR.isfinite().all()):
            message = f"{pair.module} would have an infinite value once B is scaled by {pair.scale:g}."
            raise RefusedOutput("not_finite", message, subject=pair.module, next_step="Lower alpha.")
        # llama.cpp reorders the rows of these two, of Llama alone: the halves of a head's rotary pairs alternate.
        heads = {"attn_q": base.heads, "attn_k": base.kv_heads}.get(name.split(".")[2], 0)
        if architecture == "llama" and heads:
            B_OR = B_OR.reshape(heads, 2, len(B_OR) // heads // 2, -1).transpose(1, 2).reshape(B_OR.shape)
        tensors[f"{name}.lora_a"] = pair.A_RI.to(torch.float32, copy=True).contiguous()
        tensors[f"{name}.lora_b"] = B_OR.contiguous()
        rank = max(rank, pair.rank)
    size = sum(tensor.nbytes for tensor in tensors.values())
    with staged_directory(out_dir, size + _SPARE_BYTES) as staging:
        with (staging / GGUF_FILE).open("wb") as file:
            _write(file, architecture, tensors)
        source = {"layout": "peft", "file": WEIGHTS_FILE, "digest": digest}
        write_json(staging / NOTE_FILE, {"made": "convert", "source": source})
    return ConvertReport("peft", len(tensors) // 2, rank, str(out_dir), (out_dir / GGUF_FILE).stat().st_size)


def _pair_and_name(delta: Delta) -> tuple[LowRank, str]:
    """The delta as a pair of a linear layer, and llama.cpp's name of the weight."""
    if not isinstance(delta, LowRank) or delta.layout is not Layout.LINEAR or delta.begin or delta.stacked:
        message = f"{delta.weight} changes by more than the low-rank pair of a linear layer, all that GGUF holds."
        raise NotSupported("gguf_module", message, subject=delta.weight)
    match = _WEIGHT.fullmatch(delta.weight)
    if match is None or match[2] not in PROJECTIONS:
        message = f"{delta.module} has no name in a GGUF adapter here: only {', '.join(PROJECTIONS)} of the layers do."
        raise NotSupported("gguf_module", message, subject=delta.module)
    return delta, f"blk.{match[1]}.{PROJECTIONS[match[2]]}.weight"


def _write(file: BinaryIO, architecture: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes GGUF, version 3: metadata, the tensors' descriptions, and their values, each on a multiple of 32 bytes."""
    strings = {"general.architecture": architecture, "general.type": "adapter", "adapter.type": "lora"}
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(strings) + 1)
    for key, value in strings.items():
        head += _text(key) + struct.pack("<I", _STRING) + _text(value)
    head += _text("adapter.lora.alpha") + struct.pack("<If", _FLOAT32, 0.0)
    offset = 0
    for name, tensor in tensors.items():
        rows, columns = tensor.shape
        head += _text(name) + struct.pack("<IQQIQ", 2, columns, rows, _F32, offset)  # the innermost dimension first
        offset += tensor.nbytes + -tensor.nbytes % _ALIGNMENT
    file.write(head + bytes(-len(head) % _ALIGNMENT))
    for tensor in tensors.values():
        file.write(tensor.numpy().astype("<f4", copy=False).tobytes() + bytes(-tensor.nbytes % _ALIGNMENT))


def _text(value: str) -> bytes:
    encoded = value.encode()
    return struct.pack("<Q", len(encoded)) + encoded
