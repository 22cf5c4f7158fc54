"""Tiny real models shared by the tests of this directory."""

import hashlib
import shutil
from collections.abc import Callable
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

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
        shutil.copytree(_made_once(kind, tied, dtype, shard, vocabulary).name, directory / name)
        return directory / name

    return make


@lru_cache
def _made_once(kind: str, tied: bool, dtype: torch.dtype, shard: str, vocabulary: int) -> TemporaryDirectory[str]:
    made = TemporaryDirectory(prefix="adaptory-model-")
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(build_config(kind, tied, vocabulary)).to(dtype)
    model.save_pretrained(made.name, max_shard_size=shard)
    return made


def adapter_maker(directory: Path) -> MakeAdapter:
    def make(base: Path, name: str = "adapter", *, seed: int = 1, size: float = 0.3, **settings: object) -> Path:
        torch.manual_seed(seed)
        config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **settings})
        model = get_peft_model(load_model(base), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * size)
        model.save_pretrained(str(directory / name))
        return directory / name

    return make


_LOADED: dict[str, PreTrainedModel] = {}
_KEPT = 8


def load_model(path: Path) -> PreTrainedModel:
    """A model for one test. The same bytes are loaded once: loading took a quarter of the composer's tests."""
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode() + file.read_bytes())
    loaded = _LOADED.pop(digest.hexdigest(), None) or AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    _LOADED[digest.hexdigest()] = loaded  # most recently used last
    if len(_LOADED) > _KEPT:
        del _LOADED[next(iter(_LOADED))]
    model = deepcopy(loaded)
    model.name_or_path = str(path)  # an adapter's config names the model that it was trained on
    return model


def tensors_in(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, name: str) -> None:
    error = (ours.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-12)
    assert error <= 1e-6, f"{name} differs by {error:.2e}"
