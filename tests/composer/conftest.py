"""Real, tiny models and adapters: built from a config, saved by transformers and PEFT, no download."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from composer.model import LoadedModel
from composer.model import load_model as load_for_measuring
from composer.variants import LoadedAdapter
from tests.composer.small_model import Load, load_adapter, save_llama
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


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer: what suites and conflict reports look at."""
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def loaded(base: Path) -> LoadedModel:
    return load_for_measuring(base, device="cpu")


@pytest.fixture(scope="module")
def load(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Load:
    def load(name: str, seed: int, **config: object) -> LoadedAdapter:
        return load_adapter(base, tmp_path_factory.mktemp("adapters") / name, seed, **config)

    return load


@pytest.fixture(scope="module")
def red(load: Load) -> LoadedAdapter:
    return load("red", 1)


@pytest.fixture(scope="module")
def green(load: Load) -> LoadedAdapter:
    return load("green", 2, r=2, target_modules=["q_proj", "o_proj"])
