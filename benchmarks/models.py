"""A checkpoint and adapters of a given size, made in seconds: TinyLlama's shapes, values as wide as those of trained
weights.

22 layers of the usual width are 1.1 billion parameters. All values come from one block of normal bfloat16 numbers, read
from another offset for each tensor: no disk or compressor sees a pattern, and no slow random generator is needed.

`python -m benchmarks.models DIRECTORY LAYERS RANK [WIDTH]` writes `base` and adapters `one`, `two`, `three`: in its own
process, since the kernel counts a benchmark's memory as that of its child processes.
"""

import json
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from composer.formats.checkpoints.header import TensorSpec, encode_header

ADAPTERS = ("one", "two", "three")
WIDTH, VOCABULARY = 2048, 32_000
_BLOCK = 1 << 25  # values: more than any tensor has, except the embedding
_SHARDS = 4


@dataclass(frozen=True, slots=True)
class Size:
    """`width` is the size of the hidden states, a multiple of 512; the other sizes follow from it as in TinyLlama."""

    layers: int
    width: int = WIDTH

    @property
    def inner(self) -> int:
        return self.width * 11 // 4

    @property
    def key_value(self) -> int:
        return self.width // 8

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """module -> (outputs, inputs)"""
        return {
            "self_attn.q_proj": (self.width, self.width), "self_attn.k_proj": (self.key_value, self.width),
            "self_attn.v_proj": (self.key_value, self.width), "self_attn.o_proj": (self.width, self.width),
            "mlp.gate_proj": (self.inner, self.width), "mlp.up_proj": (self.inner, self.width),
            "mlp.down_proj": (self.width, self.inner),
        }  # fmt: skip


def make_base(directory: Path, size: Size) -> Path:
    """A Llama checkpoint in bfloat16, untied, in four shards, without a tokenizer."""
    directory.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": size.width, "hidden_act": "silu",
        "intermediate_size": size.inner, "num_hidden_layers": size.layers, "num_attention_heads": size.width // 64,
        "num_key_value_heads": size.key_value // 64, "vocab_size": VOCABULARY, "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 1,
        "eos_token_id": 2, "initializer_range": 0.02,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    tensors = list(_tensors(size))
    total = sum(spec.size_bytes for _, spec in tensors)
    weight_map: dict[str, str] = {}
    values, begin, passed = _Values(0.02), 0, 0
    for number in range(1, _SHARDS + 1):
        end = begin
        while end < len(tensors) and (passed < total * number / _SHARDS or number == _SHARDS):
            passed += tensors[end][1].size_bytes
            end += 1
        file = f"model-{number:05}-of-{_SHARDS:05}.safetensors"
        _write(directory / file, dict(tensors[begin:end]), values)
        weight_map |= dict.fromkeys((name for name, _ in tensors[begin:end]), file)
        begin = end
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def make_adapter(directory: Path, size: Size, rank: int, seed: int, modules: Collection[str] = ()) -> Path:
    """A LoRA adapter in bfloat16 on these linear modules of every layer, by default all seven, in PEFT's format."""
    directory.mkdir()
    linear = {name: shape for name, shape in size.linear.items() if not modules or name in modules}
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "task_type": "CAUSAL_LM", "bias": "none",
        "target_modules": sorted(name.split(".")[1] for name in linear),
    }  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps(config))
    tensors: dict[str, TensorSpec] = {}
    for layer in range(size.layers):
        for name, (outputs, inputs) in linear.items():
            path = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{path}.lora_A.weight"] = TensorSpec("BF16", (rank, inputs))
            tensors[f"{path}.lora_B.weight"] = TensorSpec("BF16", (outputs, rank))
    _write(directory / "adapter_model.safetensors", tensors, _Values(0.016, seed))
    return directory


def _tensors(size: Size) -> Iterator[tuple[str, TensorSpec]]:
    yield "model.embed_tokens.weight", TensorSpec("BF16", (VOCABULARY, size.width))
    for layer in range(size.layers):
        for name, shape in size.linear.items():
            yield f"model.layers.{layer}.{name}.weight", TensorSpec("BF16", shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{name}.weight", TensorSpec("BF16", (size.width,))
    yield "model.norm.weight", TensorSpec("BF16", (size.width,))
    yield "lm_head.weight", TensorSpec("BF16", (VOCABULARY, size.width))


class _Values:
    """Bytes of normal bfloat16 values with the given deviation, at another offset for each tensor."""

    def __init__(self, deviation: float, seed: int = 0) -> None:
        self._random = np.random.default_rng(seed)
        block = self._random.standard_normal(_BLOCK, dtype=np.float32) * np.float32(deviation)
        self._block: npt.NDArray[np.uint16] = (block.view(np.uint32) >> 16).astype(np.uint16)

    def runs(self, count: int) -> Iterator[bytes]:
        while count:
            begin = int(self._random.integers(_BLOCK // 2))
            run = self._block[begin : begin + count]
            yield run.tobytes()
            count -= run.size


def _write(path: Path, tensors: Mapping[str, TensorSpec], values: _Values) -> None:
    with path.open("wb") as file:
        file.write(encode_header(tensors, {"format": "pt"}))
        for spec in tensors.values():
            file.writelines(values.runs(spec.elements))


if __name__ == "__main__":
    _, given, layers, rank, *width = sys.argv
    Path(given).mkdir()
    size = Size(int(layers), *map(int, width))
    make_base(Path(given) / "base", size)
    for number, name in enumerate(ADAPTERS, start=1):
        make_adapter(Path(given) / name, size, int(rank), number)
