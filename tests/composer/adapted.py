"""Adapters of all types of PEFT with random parameters, and PEFT's own results for them."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from composer.deltas.delta import RowwiseDelta
from composer.deltas.variants.load import load_deltas
from composer.evaluation.hooks import deltas_applied
from composer.formats.checkpoints.checkpoint import Architecture, open_checkpoint
from composer.formats.checkpoints.header import TensorSpec
from composer.merge.plan import MergePlan, plan_merge
from composer.merge.run import run_merge
from tests.composer.tiny import load_model
from tests.device import DEVICE
from tests.second_device import NoArithmeticOnCpu

IDS = torch.arange(20).reshape(2, 10)
Weights = dict[str, torch.Tensor]


def save_adapted(base: Path, config: PeftConfig, directory: Path, seed: int = 1, size: float = 0.3) -> Path:
    torch.manual_seed(seed)
    _adapted(load_model(base), config, directory, size)
    return directory


def save_adapted_layers(layers: nn.Module, config: PeftConfig, directory: Path) -> Weights:
    """An adapter of layers outside a language model, and the tensors that result from PEFT's merge."""
    return _adapted(layers, config, directory, 0.3).merge_and_unload().state_dict()


def assert_rows_follow_the_device(delta: RowwiseDelta, accelerator: str) -> None:
    """Rows of a weight on an accelerator are computed there, and are the CPU's."""
    W_MN = torch.randn(delta.stored_shape, generator=torch.Generator().manual_seed(0))
    with NoArithmeticOnCpu():
        rows_MN = delta.rows(W_MN.to(accelerator), 0)
    assert rows_MN.device.type == accelerator, delta.module
    assert relative(rows_MN.cpu(), delta.rows(W_MN, 0)) < 1e-6, delta.module


def _adapted(model: nn.Module, config: PeftConfig, directory: Path, size: float) -> PeftModel:
    """The adapted model; every trained number is random, so that no part of a formula is multiplied by zero."""
    adapted = get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * size)
    adapted.save_pretrained(str(directory))
    return adapted


def changed_by(layers: nn.Module, before: Weights, adapter: Path) -> Weights:
    """The layers' tensors with the adapter's deltas, as the composer computes them."""
    layers.load_state_dict(before)
    with deltas_applied(layers, load_deltas(adapter, architecture_of(before)).deltas):
        return {name: tensor.clone() for name, tensor in layers.state_dict().items()}


def architecture_of(tensors: Weights) -> Architecture:
    shapes = {name: TensorSpec("F32", tuple(tensor.shape)) for name, tensor in tensors.items()}
    return Architecture("", False, shapes)


def change_tensors(adapter: Path, change: Callable[[Weights], Weights]) -> None:
    path = adapter / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def change_config(adapter: Path, **fields: object) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def peft_merged(base: Path, adapter: Path) -> Weights:
    model = PeftModel.from_pretrained(load_model(base), adapter).merge_and_unload()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def peft_logits(base: Path, adapter: Path) -> torch.Tensor:
    with torch.no_grad():
        return PeftModel.from_pretrained(load_model(base), adapter).eval()(IDS).logits


def logits(checkpoint: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_model(checkpoint).eval()(IDS).logits


def merge(base: Path, adapter: Path, out: Path, **settings: object) -> MergePlan:
    plan = plan_merge(open_checkpoint(base), [(adapter, 1.0)], settings=settings)
    run_merge(plan, out, device=DEVICE)
    return plan


def assert_merged_like_peft(base: Path, adapter: Path, out: Path, tolerance: float = 1e-6) -> None:
    """Each tensor equals that of PEFT's merge and all others are unchanged; the merged checkpoint, loaded again,
    computes the same as PEFT with the active adapter."""
    touched = merge(base, adapter, out).touched
    expected, merged = peft_merged(base, adapter), load_model(out).state_dict()
    assert touched
    assert merged.keys() == expected.keys()
    assert_all_close(merged, expected, tolerance)
    # A logit is a sum of thousands of products, whose rounding errors add up.
    assert relative(logits(out), peft_logits(base, adapter)) <= 10 * tolerance


def assert_all_close(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor], tolerance: float) -> None:
    errors = {name: relative(tensor, theirs[name]) for name, tensor in ours.items()}
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] <= tolerance, f"{worst} differs by {errors[worst]:.2e}"


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-12))
