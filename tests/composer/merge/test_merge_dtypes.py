"""Checkpoints in fp8: refused by name, or dequantized on request; and other defects of checkpoints."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from composer.errors import InvalidFile, NotSupported
from composer.formats.checkpoints.checkpoint import open_checkpoint
from composer.merge.plan import plan_merge
from composer.merge.run import run_merge
from tests.composer.tiny import MakeAdapter, MakeModel, assert_close, load_model, tensors_in
from tests.device import DEVICE


def scaled_like(kind: str, weight: torch.Tensor) -> tuple[str, torch.Tensor]:
    """(suffix of its name, scale) of one kind: for the whole matrix, each row or each block of 8 x 8."""
    if kind == "tensor":
        return "_scale", (weight.abs().max() / 448).reshape(())
    if kind == "row":
        return "_scale", weight.abs().amax(dim=1, keepdim=True) / 448
    rows, columns = (-(-size // 8) for size in weight.shape)
    scale = torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            scale[i, j] = weight[8 * i : 8 * i + 8, 8 * j : 8 * j + 8].abs().max() / 448
    return "_scale_inv", scale


def spread(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    if scale.numel() == 1:
        return scale.reshape(1, 1).expand(shape)
    if scale.shape[1] == 1:
        return scale.expand(shape)
    return scale.repeat_interleave(8, 0).repeat_interleave(8, 1)[: shape[0], : shape[1]]


def to_fp8(base: Path, kind: str) -> dict[str, torch.Tensor]:
    """Quantizes the linear layers of a checkpoint in place; returns the values that they represent."""
    values: dict[str, torch.Tensor] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in load_file(base / "model.safetensors").items():
        if not name.endswith("proj.weight"):
            tensors[name] = values[name] = weight
            continue
        suffix, scale = scaled_like(kind, weight.float())
        tensors[name] = (weight.float() / spread(scale, weight.shape)).to(torch.float8_e4m3fn)
        tensors[name + suffix] = scale
        values[name] = tensors[name].float() * spread(scale, weight.shape)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [8, 8] if kind == "block" else None}
    (base / "config.json").write_text(json.dumps(config))
    return values


@pytest.fixture
def pair(make_model: MakeModel, make_adapter: MakeAdapter) -> tuple[Path, Path]:
    base = make_model(dtype=torch.bfloat16, shard="1GB")
    return base, make_adapter(base)


@pytest.mark.parametrize("kind", ["tensor", "row", "block"])
def test_an_fp8_checkpoint_is_merged_as_the_values_it_stands_for(
    kind: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = pair
    values = to_fp8(base, kind)
    plan = plan_merge(open_checkpoint(base, dequantize=True), [(adapter, 1.0)], dtype="fp32")
    run_merge(plan, tmp_path / "merged", DEVICE)
    factors = load_file(adapter / "adapter_model.safetensors")
    merged = tensors_in(tmp_path / "merged")
    assert merged.keys() == values.keys()
    for name, value in values.items():
        key = f"base_model.model.{name.removesuffix('weight')}"
        if f"{key}lora_B.weight" in factors:
            value = value + 2 * factors[f"{key}lora_B.weight"] @ factors[f"{key}lora_A.weight"]
        assert_close(merged[name], value, name)
    config = open_checkpoint(tmp_path / "merged").config
    assert "quantization_config" not in config
    load_model(tmp_path / "merged")


def test_dequantized_weights_are_bfloat16_unless_a_dtype_is_given(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    to_fp8(base, "block")
    run_merge(plan_merge(open_checkpoint(base, dequantize=True), [(adapter, 1.0)]), tmp_path / "merged", DEVICE)
    assert {tensor.dtype for tensor in tensors_in(tmp_path / "merged").values()} == {torch.bfloat16}


def test_an_fp8_checkpoint_is_refused_without_the_option_which_the_error_names(pair: tuple[Path, Path]) -> None:
    to_fp8(pair[0], "tensor")
    with pytest.raises(NotSupported, match="--dequantize"):
        open_checkpoint(pair[0])


def test_a_base_that_is_not_quantized_cannot_be_dequantized(pair: tuple[Path, Path]) -> None:
    base, adapter = pair
    with pytest.raises(NotSupported, match="no weights in 4 bits") as caught:
        plan_merge(open_checkpoint(base, dequantize=True), [(adapter, 1.0)])
    assert caught.value.code == "not_quantized"


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes"])
def test_other_quantizations_are_refused_whatever_one_asks_for(method: str, pair: tuple[Path, Path]) -> None:
    config = json.loads((pair[0] / "config.json").read_text())
    (pair[0] / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
    with pytest.raises(NotSupported, match=method):
        open_checkpoint(pair[0], dequantize=True)


@pytest.mark.parametrize("damage", ["missing", "of another shape"])
def test_an_fp8_weight_whose_scale_does_not_fit_is_named(damage: str, pair: tuple[Path, Path]) -> None:
    base, adapter = pair
    to_fp8(base, "block")
    tensors = load_file(base / "model.safetensors")
    name = next(name for name in tensors if name.endswith("_scale_inv"))
    if damage == "missing":
        del tensors[name]
    else:
        tensors[name] = torch.ones(3, 5)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(NotSupported) as caught:
        plan_merge(open_checkpoint(base, dequantize=True), [(adapter, 1.0)])
    assert caught.value.subject == name.removesuffix("_scale_inv")


@pytest.mark.parametrize("stated", [[0, 0], [8, -8], ["a", "b"], [8, None], [8.0, 8.0], [True, True], [[8], [8]]])
def test_a_block_size_that_is_none_is_refused_by_the_name_of_its_weight(
    stated: list[object], pair: tuple[Path, Path]
) -> None:
    base, adapter = pair
    to_fp8(base, "block")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = stated
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(NotSupported, match="does not fit") as caught:
        plan_merge(open_checkpoint(base, dequantize=True), [(adapter, 1.0)])
    assert caught.value.subject.endswith("proj.weight")


def test_a_missing_tokenizer_is_a_notice(pair: tuple[Path, Path]) -> None:
    base, adapter = pair
    (finding,) = plan_merge(open_checkpoint(base), [(adapter, 1.0)]).findings
    assert (finding.code, finding.severity) == ("no_tokenizer", "notice")
    (base / "tokenizer.json").write_text("{}")
    assert plan_merge(open_checkpoint(base), [(adapter, 1.0)]).findings == ()


def test_a_tensor_in_two_shards_is_refused_by_name(make_model: MakeModel) -> None:
    base = make_model(shard="8KB")
    one, two = sorted(base.glob("*.safetensors"))[:2]
    name, tensor = next(iter(load_file(one).items()))
    save_file({**load_file(two), name: tensor}, two, {"format": "pt"})
    with pytest.raises(InvalidFile, match=name) as caught:
        open_checkpoint(base)
    assert caught.value.subject == two.name


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"target_modules": "all-linear", "r": 70}])
def test_a_base_in_float64_is_merged_in_float64(
    make_model: MakeModel, make_adapter: MakeAdapter, tmp_path: Path, settings: dict[str, object]
) -> None:
    single = make_model()
    adapter = make_adapter(single, **settings)
    base = shutil.copytree(single, tmp_path / "double")
    before: dict[str, torch.Tensor] = {}
    for file in base.glob("*.safetensors"):
        tensors = {name: tensor.double() + 1e-9 for name, tensor in load_file(file).items()}
        before |= tensors
        save_file(tensors, file, {"format": "pt"})
    merged: dict[str, dict[str, torch.Tensor]] = {}
    for name, path in (("double", base), ("single", single)):
        run_merge(plan_merge(open_checkpoint(path), [(adapter, 1.0)]), tmp_path / f"{name}-merged", DEVICE)
        merged[name] = tensors_in(tmp_path / f"{name}-merged")
    changed = 0
    for name, tensor in merged["double"].items():
        assert tensor.dtype is torch.float64
        if torch.equal(tensor, before[name]):
            continue
        changed += 1
        assert_close(tensor, merged["single"][name], name)
        lost = tensor - tensor.float().double()
        assert float(lost.abs().max()) > 0, "more digits than float32 has"
    assert changed
    plan = plan_merge(open_checkpoint(base), [(adapter, 1.0)], dtype="fp32")
    run_merge(plan, tmp_path / "rounded", DEVICE)
    rounded = tensors_in(tmp_path / "rounded")
    assert all(torch.equal(rounded[name], tensor.float()) for name, tensor in merged["double"].items())
