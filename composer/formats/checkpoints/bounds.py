"""Checks a model's configuration against the tensors beside it: everything that transformers would build must exist."""

import json
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, cast

from composer.errors import InvalidFile
from composer.formats.checkpoints.checkpoint import MAX_JSON_BYTES, Checkpoint, contained
from composer.formats.untrusted import read_bytes

_LAYERS = frozenset({
    "num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "num_decoder_layers",
    "num_blocks", "depth", "attention_types",
})  # fmt: skip
_PARTS = frozenset({
    "num_attention_heads", "num_key_value_heads", "n_head", "num_experts", "num_local_experts", "n_routed_experts",
    "moe_num_experts", "num_labels",
})  # fmt: skip
_SIZES = frozenset({
    "hidden_size", "n_embd", "d_model", "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size",
    "ffn_dim", "n_inner", "d_ff", "vocab_size", "head_dim", "n_positions", "kv_lora_rank", "q_lora_rank",
    "rotary_dim", "state_size", "partial_rotary_factor",
})  # fmt: skip
_TOKENIZER = "tokenizer.json"
_GROWTH = 1_000
_PACKING = 64
"""The number of elements that a quantized tensor may pack into one."""


def refuse_larger_than_its_tensors(checkpoint: Checkpoint) -> None:
    """Raises InvalidFile if the configuration states more layers than the checkpoint has tensors, more heads or experts
    than tensors or rows, or a width beyond that of its widest tensor: building such a model would take memory and time
    without end."""
    tensors = checkpoint.architecture.tensors
    widest = max((side for spec in tensors.values() for side in spec.shape), default=0)
    limits = {_LAYERS: len(tensors), _PARTS: max(len(tensors), widest), _SIZES: _PACKING * widest}
    for field, stated in _numbers(checkpoint.config, ""):
        limit = next((limit for names, limit in limits.items() if field.rpartition(".")[2] in names), stated)
        if stated > limit:
            raise InvalidFile(
                "bad_config",
                f"config.json: {field} is {stated:,}, and the checkpoint's {len(tensors):,} tensors, the widest with "
                f"{widest:,} elements on a side, allow {limit:,} at most.",
                subject="config.json",
                next_step="Take config.json from the same source as the weights.",
            )


def refuse_growing_text(directory: Path) -> None:
    """Raises InvalidFile if the tokenizer beside a model repeatedly replaces texts by longer ones: thirty doublings
    turn a line into gigabytes, in one call that cannot be interrupted."""
    path = directory / _TOKENIZER
    if not path.is_file():
        return
    try:
        content: object = json.loads(read_bytes(contained(directory, _TOKENIZER), MAX_JSON_BYTES))
    except (ValueError, RecursionError):
        return  # transformers reports the error in it
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        if isinstance(content, dict) and _growth(cast("dict[str, object]", content).get(part)) > _GROWTH:
            raise InvalidFile(
                "bad_config",
                f"{_TOKENIZER}: its {part} makes a text more than {_GROWTH:,} times as long.",
                subject=_TOKENIZER,
                next_step=f"Take {_TOKENIZER} from where the weights are from.",
            )


def _growth(part: object) -> float:
    """The largest factor by which the replacements of a tokenizer's part, one after another, lengthen a text."""
    if isinstance(part, list):
        return min(prod(map(_growth, cast("list[object]", part))), 2.0 * _GROWTH)
    if not isinstance(part, dict):
        return 1.0
    stated = cast("dict[str, object]", part)
    if stated.get("type") != "Replace":
        return _growth([cast("list[object]", step) for step in stated.values() if isinstance(step, list)])
    pattern, content = stated.get("pattern"), stated.get("content")
    text = cast("dict[str, object]", pattern).get("String") if isinstance(pattern, dict) else None
    new = len(content) if isinstance(content, str) else 0
    return max(1.0, new / len(text) if isinstance(text, str) and text else 1.0 + new)  # a regex may match nothing


def _numbers(value: object, field: str) -> Iterator[tuple[str, int | float]]:
    """All numbers by the dotted path of their field; numbers in a list by the path of the list."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield field, value
    elif isinstance(value, Mapping):
        for name, part in cast("Mapping[str, Any]", value).items():
            yield from _numbers(part, f"{field}.{name}" if field else name)
    elif isinstance(value, list):
        for part in cast("list[object]", value):
            yield from _numbers(part, field)
