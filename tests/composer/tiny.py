"""Tiny real models: what the tests of this directory share."""

from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel

MakeModel = Callable[..., Path]
MakeAdapter = Callable[..., Path]


def build_config(kind: str, tied: bool, vocabulary: int = 64) -> LlamaConfig | GPT2Config:
    if kind == "gpt2":
        return GPT2Config(
            vocab_size=vocabulary, n_positions=32, n_embd=16, n_layer=2, n_head=2, tie_word_embeddings=tied
        )
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied, max_position_embeddings=32, )  # fmt: skip


def model_maker(directory: Path) -> MakeModel:
    def make(
        kind: str = "llama",
        *,
        tied: bool = False,
        dtype: torch.dtype = torch.float32,
        shard: str = "8KB",
        name: str = "base",
        vocabulary: int = 64,
    ) -> Path:
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(build_config(kind, tied, vocabulary)).to(dtype)
        model.save_pretrained(directory / name, max_shard_size=shard)
        return directory / name

    return make


def adapter_maker(directory: Path) -> MakeAdapter:
    def make(base: Path, name: str = "adapter", *, seed: int = 1, size: float = 0.3, **settings: object) -> Path:
        torch.manual_seed(seed)
        config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **settings})
        model = get_peft_model(load_model(base), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * size)
        model.save_pretrained(directory / name)
        return directory / name

    return make


def load_model(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def tensors_in(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, name: str) -> None:
    error = (ours.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-12)
    assert error <= 1e-6, f"{name} differs by {error:.2e}"
