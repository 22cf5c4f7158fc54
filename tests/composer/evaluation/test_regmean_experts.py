"""Fitting on stacks of experts: each expert on the tokens that its router sends to it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.configuration_utils import PreTrainedConfig

from composer.deltas.delta import Delta
from composer.deltas.variants.load import LoadedAdapter, load_deltas
from composer.evaluation.calibration import Calibration
from composer.evaluation.hooks import deltas_applied
from composer.evaluation.model import LoadedModel, load_model
from composer.evaluation.observe import ForwardPass
from composer.evaluation.stack_inputs import Stack
from composer.export.combine import combine
from composer.formats.checkpoints.checkpoint import open_checkpoint
from composer.formats.recipes.methods import Regmean
from composer.formats.recipes.suite import CalibrationSet
from composer.methods.combine import combine_deltas
from tests.composer.adapted import IDS, peft_logits, relative, save_adapted
from tests.composer.deltas.test_variants_experts import DOWN, GATE, gpt_oss, lora, mixtral, qwen3, save_base
from tests.composer.small_model import save_tokenizer
from tests.device import DEVICE

MODELS: dict[str, Callable[..., PreTrainedConfig]] = {"Mixtral": mixtral, "Qwen3-MoE": qwen3, "GPT-OSS": gpt_oss}
# Fewer tokens than a module has inputs: the members' parts of the fit are independent, and it can be exact.
PROMPTS = (("red",), ("A 12",))


def base_of(model: str, tmp_path: Path) -> tuple[Path, LoadedModel]:
    base = save_base(MODELS[model](), tmp_path / "base")
    save_tokenizer(base, template=None)
    return base, load_model(str(base), device=DEVICE)


def members_of(base: Path, tmp_path: Path, *parameters: str, **settings: Any) -> list[Path]:
    config = [{"r": 2, "lora_alpha": 3}, {"r": 3, "lora_alpha": 4}]
    return [
        save_adapted(base, lora(*parameters, **{**own, **settings}), tmp_path / f"member{seed}", seed=seed)
        for seed, own in enumerate(config, 1)
    ]


def calibration(loaded: LoadedModel) -> Calibration:
    return Calibration(lambda: loaded, [CalibrationSet(prompts=own) for own in PROMPTS], settings=Regmean())


def loaded_adapters(base: Path, paths: list[Path]) -> list[LoadedAdapter]:
    return [load_deltas(path, open_checkpoint(base).architecture) for path in paths]


def output(loaded: LoadedModel, prompt: str, deltas: list[Delta]) -> torch.Tensor:
    with torch.inference_mode(), deltas_applied(loaded.model, deltas):
        ids = torch.tensor([loaded.tokenizer(prompt)["input_ids"]], device=loaded.device)
        return loaded.model(ids).logits.cpu()


@pytest.mark.parametrize("model", MODELS)
def test_the_fit_does_on_each_members_prompts_what_the_member_does_alone(model: str, tmp_path: Path) -> None:
    base, loaded = base_of(model, tmp_path)
    adapters = loaded_adapters(base, members_of(base, tmp_path, GATE, DOWN))
    settings = {"ridge": 1e-4, "steps": 2}
    combined = combine_deltas(adapters, [1.0, 1.0], "regmean", settings, calibration(loaded).observe, loaded.device)
    assert combined.fit is not None
    assert combined.fit.fitted == 6  # q_proj and two stacks, in two layers
    assert all("experts" in name for name in combined.fit.kept_at_sum), "only experts that no token reached"
    assert max(combined.fit.errors) < 0.1 * min(combined.fit.errors_of_sum)
    summed = combine_deltas(adapters, [1.0, 1.0], "stack").deltas
    for adapter, prompts in zip(adapters, PROMPTS, strict=True):
        wanted = output(loaded, prompts[0], list(adapter.deltas))
        lost, lost_by_sum = (relative(output(loaded, prompts[0], own), wanted) for own in (combined.deltas, summed))
        assert lost < 0.2 * lost_by_sum


@pytest.mark.parametrize("model", MODELS)
def test_the_fitted_stacks_are_packed_and_load_in_peft(model: str, tmp_path: Path) -> None:
    base, loaded = base_of(model, tmp_path)
    paths, known = members_of(base, tmp_path, GATE, DOWN), open_checkpoint(base).architecture
    both = tmp_path / "both"
    combine([(path, 1.0) for path in paths], both, known, "regmean", calibration=calibration(loaded), device=DEVICE)
    deltas = combine_deltas(
        loaded_adapters(base, paths), [1.0, 1.0], "regmean", {}, calibration(loaded).observe, loaded.device
    ).deltas
    with torch.inference_mode(), deltas_applied(loaded.model, deltas):
        assert relative(loaded.model(IDS.to(loaded.device)).logits.cpu(), peft_logits(base, both)) < 1e-5


def test_a_routers_weight_is_fitted_on_what_the_router_sees(tmp_path: Path) -> None:
    base, loaded = base_of("Mixtral", tmp_path)
    adapters = loaded_adapters(base, members_of(base, tmp_path, "mlp.gate.weight"))
    fit = combine_deltas(adapters, [1.0, 1.0], "regmean", {}, calibration(loaded).observe, loaded.device).fit
    assert fit is not None
    assert (fit.fitted, fit.kept_at_sum) == (4, ())


@pytest.mark.parametrize("model", MODELS)
def test_the_inputs_of_experts_give_the_output_of_their_layer(model: str, tmp_path: Path) -> None:
    """The layer's output is Σ over experts of the router's weight times W x + b, where x are the inputs of a fit."""
    _, loaded = base_of(model, tmp_path)
    path = "model.layers.0.mlp.experts"
    owner: Any = loaded.model.get_submodule(path)
    stack = Stack.of(loaded.model, f"{path}.down_proj")
    assert stack is not None
    seen: list[float] = []

    def compare(_module: object, inputs: tuple[torch.Tensor, ...], put_out: torch.Tensor) -> None:
        hidden, chosen, weights = inputs
        full_pass = ForwardPass((0,), torch.ones(1, len(hidden), dtype=torch.bool), is_padded=False)
        total = torch.zeros_like(put_out)
        for expert in range(owner.num_experts):
            rows = stack.rows(full_pass, inputs, expert)
            W = owner.down_proj[expert] if owner.is_transposed else owner.down_proj[expert].T
            bias = owner.down_proj_bias[expert] if owner.has_bias else 0
            token, slot = (chosen == expert).nonzero(as_tuple=True)
            total.index_add_(0, token, (rows @ W + bias) * weights[token, slot, None])
        seen.append(relative(total, put_out))

    handle = owner.register_forward_hook(compare)
    output(loaded, "a red door", [])
    handle.remove()
    assert len(seen) == 1
    assert seen[0] < 1e-5
