"""Quantized tensors without a decoder: refused by name, for any config and any position of the adapter."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from composer.errors import NotSupported
from composer.formats.checkpoints.checkpoint import open_checkpoint
from composer.merge.plan import plan_merge
from tests.composer.adapted import assert_merged_like_peft
from tests.composer.tiny import MakeAdapter, MakeModel

Weights = dict[str, torch.Tensor]
INTEGERS = {"quant_method": "compressed-tensors", "format": "int-quantized"}
PACKED = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
SPARSE = {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}}


def int8(name: str, weight: torch.Tensor) -> Weights:
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    return {name: (weight / scale).round().to(torch.int8), f"{name}_scale": scale}


def bitsandbytes_int8(name: str, weight: torch.Tensor) -> Weights:
    values = int8(name, weight)
    module = name.removesuffix(".weight")
    return {name: values[name], f"{module}.SCB": values[f"{name}_scale"].flatten() * 127}


def packed_int4(name: str, weight: torch.Tensor) -> Weights:
    rows, columns = weight.shape
    words = torch.zeros(rows, columns // 8, dtype=torch.int32)
    return {f"{name}_packed": words, f"{name}_scale": torch.ones(rows, 1), f"{name}_shape": torch.tensor(weight.shape)}


def mxfp4(name: str, weight: torch.Tensor) -> Weights:
    """Packed experts, which have no `.weight`."""
    module, (rows, columns) = name.removesuffix(".weight"), weight.shape
    blocks = torch.zeros(rows, columns // 32 or 1, 16, dtype=torch.uint8)
    return {f"{module}_blocks": blocks, f"{module}_scales": blocks[:, :, 0].contiguous()}


def fp8(name: str, weight: torch.Tensor) -> Weights:
    scale = weight.abs().amax(dim=1, keepdim=True) / 448
    return {name: (weight / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale}


def fp4(name: str, weight: torch.Tensor) -> Weights:
    packed = torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8)
    return {name: packed, f"{name}.quant_state.bitsandbytes__fp4": torch.zeros(8, dtype=torch.uint8)}


def quantize(base: Path, how: Callable[[str, torch.Tensor], Weights], stated: dict[str, object] | None) -> None:
    """Quantizes the linear layers except the head in place; `stated` is the description in the config."""
    tensors: Weights = {}
    for name, weight in load_file(base / "model.safetensors").items():
        tensors |= how(name, weight.float()) if name.endswith("proj.weight") else {name: weight}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | ({"quantization_config": stated} if stated else {})))


@pytest.fixture
def pair(make_model: MakeModel, make_adapter: MakeAdapter) -> tuple[Path, Path]:
    """A base and an adapter of its head alone, which no tool quantizes."""
    base = make_model(shard="1GB")
    return base, make_adapter(base, target_modules=["lm_head"])


@pytest.mark.parametrize(
    ("how", "stated", "named"),
    [
        (int8, INTEGERS, "compressed-tensors, int-quantized"),
        (packed_int4, PACKED, "compressed-tensors, pack-quantized"),
        (fp8, SPARSE, "compressed-tensors"),
        (int8, {"quant_method": "fp8"}, r"fp8\): .*proj.weight \(I8\)"),
        (int8, {"quant_method": "compressed-tensors"}, r"proj.weight \(I8\)"),
        (packed_int4, {"quant_method": "compressed-tensors"}, r"proj.weight_packed \(I32\)"),
        (fp4, {"quant_method": "bitsandbytes", "load_in_4bit": True}, r"proj.weight \(U8\)"),
        (int8, None, r"does not describe it\): .*proj.weight \(I8\)"),
        (bitsandbytes_int8, None, r"proj.weight \(I8\)"),
        (packed_int4, None, r"proj.weight_packed \(I32\)"),
        (mxfp4, None, r"proj_blocks \(U8\)"),
    ],
)
def test_what_nothing_decodes_is_refused_though_the_adapter_touches_none_of_it(
    how: Callable[[str, torch.Tensor], Weights], stated: dict[str, object] | None, named: str, pair: tuple[Path, Path]
) -> None:
    base, adapter = pair
    quantize(base, how, stated)
    with pytest.raises(NotSupported, match=named) as caught:
        plan_merge(open_checkpoint(base, dequantize=True), [(adapter, 1.0)])
    assert caught.value.code == "quantized_base"
    assert "--dequantize" not in str(caught.value.next_step)


def test_fp8_that_the_config_is_silent_of_is_refused_and_can_be_dequantized(pair: tuple[Path, Path]) -> None:
    base, adapter = pair
    quantize(base, fp8, None)
    with pytest.raises(NotSupported, match=r"_scale \(F32\)") as caught:
        plan_merge(open_checkpoint(base), [(adapter, 1.0)])
    assert "--dequantize" in str(caught.value.next_step)
    plan = plan_merge(open_checkpoint(base, dequantize=True), [(adapter, 1.0)])
    assert not any("_scale" in tensor.target.name for shard in plan.shards for tensor in shard.tensors)


def test_compressed_tensors_in_floats_are_dequantized(pair: tuple[Path, Path]) -> None:
    base, adapter = pair
    quantize(base, fp8, {"quant_method": "compressed-tensors", "format": "float-quantized"})
    plan = plan_merge(open_checkpoint(base, dequantize=True), [(adapter, 1.0)])
    assert "quantization_config" not in plan.config


def test_integers_that_are_no_weights_are_copied(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    tensors = load_file(base / "model.safetensors")
    buffers = {
        "model.embeddings.position_ids": torch.arange(32)[None],
        "model.layers.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8).tril(),
        "model.layers.0.attn.mask": torch.ones(8, 8, dtype=torch.bool),
        "model.layers.0.norm.num_batches_tracked": torch.tensor(3),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.logit_scale": torch.ones(1),
    }
    save_file(tensors | buffers, base / "model.safetensors", {"format": "pt"})
    assert plan_merge(open_checkpoint(base), [(adapter, 1.0)]).touched == ["lm_head.weight"]
    with pytest.raises(NotSupported) as caught:
        plan_merge(open_checkpoint(base, dequantize=True), [(adapter, 1.0)])
    assert caught.value.code == "not_quantized", "they are not quantized weights either"
    assert_merged_like_peft(base, adapter, tmp_path / "merged")
