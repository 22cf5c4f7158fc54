"""Adapters whose deltas depend on an order: merged one after the other, as in PEFT, if the user requests it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel

from composer.errors import NotSupported
from composer.formats.checkpoints.checkpoint import open_checkpoint
from composer.formats.recipes.methods import parse_settings
from composer.merge.plan import MergePlan, plan_merge
from composer.merge.run import run_merge
from tests.composer.adapted import assert_all_close, change_tensors, peft_merged, relative, save_adapted
from tests.composer.tiny import MakeModel, load_model, tensors_in
from tests.device import DEVICE

DORA: dict[str, Any] = {"use_dora": True}


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], **settings})


ORDERED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "two DoRA": ("llama", DORA, DORA),
    "two DoRA on Conv1D": (
        "gpt2",
        {**DORA, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
        {**DORA, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
    ),
    "LoRA, then DoRA": ("llama", {}, DORA),
    "DoRA and trained tokens, then DoRA on the embedding": (
        "llama",
        {**DORA, "trainable_token_indices": [9, 1]},
        {**DORA, "target_modules": ["embed_tokens", "q_proj"]},
    ),
}


@pytest.mark.parametrize("case", ORDERED)
def test_a_stated_order_is_that_of_merging_one_and_then_the_other_with_peft(
    case: str, tmp_path: Path, make_model: MakeModel
) -> None:
    model_type, *both = ORDERED[case]
    base = make_model(model_type, tied=False, shard="1GB")
    one, two = (save_adapted(base, lora(**own), tmp_path / f"{i}", seed=i) for i, own in enumerate(both))
    # PEFT saves the embedding's base beside its pair, and would overwrite the first adapter's training with it.
    change_tensors(two, lambda all_: {key: one for key, one in all_.items() if "base_layer" not in key})
    first = PeftModel.from_pretrained(load_model(base), one).merge_and_unload()
    first.save_pretrained(tmp_path / "first")
    expected = peft_merged(tmp_path / "first", two)
    for name, order in (("merged", [one, two]), ("reversed", [two, one])):
        run_merge(in_order(base, [(adapter, 1.0) for adapter in order]), tmp_path / name, device=DEVICE)
    merged = load_model(tmp_path / "merged").state_dict()
    assert_all_close(merged, expected, 1e-6)
    name = next(name for name in expected if "q_proj.weight" in name or "c_attn.weight" in name)
    assert relative(load_model(tmp_path / "reversed").state_dict()[name], merged[name]) > 1e-3


@pytest.mark.parametrize("case", ["two DoRA", "two DoRA on Conv1D", "LoRA, then DoRA"])
def test_active_adapters_are_merged_as_peft_merges_both_at_once(
    case: str, tmp_path: Path, make_model: MakeModel
) -> None:
    """PEFT takes the norms of the second from the base, when both are active and in `merge_and_unload` of both."""
    model_type, *both = ORDERED[case]
    base = make_model(model_type, tied=False, shard="1GB")
    one, two = (save_adapted(base, lora(**own), tmp_path / f"{i}", seed=i) for i, own in enumerate(both))
    model = PeftModel.from_pretrained(load_model(base), one, adapter_name="one")
    model.load_adapter(str(two), "two")
    model.base_model.set_adapter(["one", "two"])
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        active = model.eval()(ids).logits
    expected = model.merge_and_unload(adapter_names=["one", "two"])
    for order in ("active", True):
        run_merge(in_order(base, [(one, 1.0), (two, 1.0)], sequential=order), tmp_path / f"{order}", DEVICE)
    merged = load_model(tmp_path / "active")
    assert_all_close(merged.state_dict(), expected.state_dict(), 1e-6)
    with torch.no_grad():
        assert relative(merged.eval()(ids).logits, active) < 1e-5
    name = next(name for name in expected.state_dict() if "q_proj.weight" in name or "c_attn.weight" in name)
    apart = relative(load_model(tmp_path / "True").state_dict()[name], merged.state_dict()[name])
    assert apart > 1e-2, "the other order of the two"


def test_active_is_refused_where_it_is_not_known(tmp_path: Path, make_model: MakeModel) -> None:
    base = make_model(shard="1GB")
    dora = save_adapted(base, lora(use_dora=True), tmp_path / "dora")
    rescaling = save_adapted(base, IA3Config(target_modules=["q_proj"], feedforward_modules=[]), tmp_path / "ia3")
    with pytest.raises(NotSupported, match="DoRA only") as caught:
        in_order(base, [(dora, 1.0), (rescaling, 1.0)], sequential="active")
    assert caught.value.code == "no_active_order"


def in_order(base: Path, adapters: list[tuple[Path, float]], **settings: object) -> MergePlan:
    return plan_merge(open_checkpoint(base), adapters, "stack", {"sequential": True, **settings})


def test_weights_and_lambda_scale_each_step_of_an_order(tmp_path: Path, make_model: MakeModel) -> None:
    base = make_model(shard="1GB")
    one, two = (save_adapted(base, lora(use_dora=True), tmp_path / str(seed), seed=seed) for seed in (1, 2))
    run_merge(in_order(base, [(one, 1.0), (two, 0.8)], **{"lambda": 0.5}), tmp_path / "merged", device=DEVICE)
    halfway = plan_merge(open_checkpoint(base), [(one, 0.5)])
    run_merge(halfway, tmp_path / "halfway", device=DEVICE)
    run_merge(plan_merge(open_checkpoint(tmp_path / "halfway"), [(two, 0.4)]), tmp_path / "apart", device=DEVICE)
    assert_all_close(tensors_in(tmp_path / "merged"), tensors_in(tmp_path / "apart"), 1e-6)


def test_a_method_that_has_no_order_says_so(tmp_path: Path, make_model: MakeModel) -> None:
    base = make_model()
    one, two = (save_adapted(base, lora(use_dora=True), tmp_path / str(seed), seed=seed) for seed in (1, 2))
    with pytest.raises(NotSupported, match="sequential") as caught:
        plan_merge(open_checkpoint(base), [(one, 1.0), (two, 1.0)], "ties", {"sequential": True})
    assert caught.value.code == "unknown_setting"
    assert "sequential" not in parse_settings("stack", {"sequential": "false"}).to_json()  # nor in a lock's digest
