"""The dtype of a base's computation: its own if the device multiplies in it, float32 otherwise."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from composer.evaluation.model import load_model, multiplies_in
from tests.composer.small_model import save_llama, save_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def stored(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def base(stored: torch.dtype, tmp_path: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(save_llama(tmp_path / "float32"), dtype=stored)
    model.save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    return tmp_path / "base"


def test_a_base_of_16_bits_is_computed_in_what_the_cpu_multiplies_in(base: Path, stored: torch.dtype) -> None:
    computed = load_model(base, device="cpu").model
    assert computed.dtype == (stored if multiplies_in(stored, CPU) else torch.float32)
    own = load_model(base, device="cpu", dtype=stored).model
    assert own.dtype == stored
    for name, weight in own.state_dict().items():
        assert torch.equal(computed.state_dict()[name].float(), weight.float()), "the same weights, to the last bit"


def test_where_the_larger_weights_do_not_fit_the_base_is_computed_in_its_own_numbers(
    base: Path, stored: torch.dtype
) -> None:
    size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    loaded = load_model(base, device="cpu", memory=int(1.5 * size))
    assert (loaded.model.dtype, loaded.streamed) == (stored, False)


def test_every_device_multiplies_in_float32() -> None:
    assert multiplies_in(torch.float32, CPU)
    assert multiplies_in(torch.bfloat16, torch.device("cuda"))
