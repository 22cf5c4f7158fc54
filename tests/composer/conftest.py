"""Real, tiny models and adapters: built from a config, saved by transformers and PEFT, no download."""

import sys
from collections.abc import Generator
from pathlib import Path

import pytest

from composer.deltas.tensors import torch_device
from composer.deltas.variants.load import LoadedAdapter
from composer.evaluation.model import LoadedModel
from composer.evaluation.model import load_model as load_for_measuring
from tests import second_device
from tests.composer.small_model import Load, load_adapter, save_llama
from tests.composer.tiny import MakeAdapter, MakeModel, adapter_maker, model_maker


@pytest.fixture(scope="session", autouse=True)
def _auto_is_the_tests_device() -> Generator[None]:  # pyright: ignore[reportUnusedFunction]
    """Automatic choices of a device are the fake device too, with `pytest --device`."""
    from tests.device import DEVICE  # this file is imported before the option is known

    with pytest.MonkeyPatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if DEVICE == second_device.NAME and name.startswith("composer.") and hasattr(module, "torch_device"):
                patch.setattr(module, "torch_device", lambda name: torch_device(DEVICE if name == "auto" else name))
        yield


@pytest.fixture
def make_model(tmp_path: Path) -> MakeModel:
    return model_maker(tmp_path)


@pytest.fixture
def make_adapter(tmp_path: Path) -> MakeAdapter:
    return adapter_maker(tmp_path)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer, for suites and conflict reports."""
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def loaded(base: Path) -> LoadedModel:
    from tests.device import DEVICE  # this file is imported before the option is known

    return load_for_measuring(base, device=DEVICE)


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
