"""Adapters whose deltas depend on an order: merged one after the other, as in PEFT, if the user requests it."""

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftModel

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
