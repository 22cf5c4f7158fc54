"""Real, tiny models and adapters: built from a config, saved by transformers and PEFT, no download."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.composer.tiny import MakeAdapter, MakeModel, build_config, load_model


@pytest.fixture
def make_model(tmp_path: Path) -> MakeModel:
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
        model.save_pretrained(tmp_path / name, max_shard_size=shard)
        return tmp_path / name

    return make


@pytest.fixture
def make_adapter(tmp_path: Path) -> MakeAdapter:
    def make(base: Path, name: str = "adapter", *, seed: int = 1, size: float = 0.3, **settings: object) -> Path:
        torch.manual_seed(seed)
        config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **settings})
        model = get_peft_model(load_model(base), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * size)
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make
