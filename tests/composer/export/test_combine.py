"""A combination is an ordinary PEFT adapter whose forward pass is the weighted sum of its members' deltas."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file

from composer.deltas.delta import Layout, LowRank, Replacement
from composer.errors import InvalidFile, Mismatch, NotSupported, RefusedOutput
from composer.export.combine import combine
from composer.export.peft import peft_form, write_adapter
from composer.formats.checkpoints.checkpoint import open_checkpoint
from composer.formats.recipes.methods import PIPELINES, parse_settings, settings_of
from composer.merge.plan import plan_merge
from composer.merge.run import run_merge
from composer.methods.combine import combine_parsed
from tests.composer.tiny import MakeAdapter, MakeModel, assert_close, load_model, tensors_in
from tests.device import DEVICE
from tests.doses import each_value_once

IDS = torch.arange(24).reshape(2, 12)
MEMBERS: dict[str, list[dict[str, object]]] = {
    "same targets": [{}, {"r": 8}],
    "one adapter": [{"use_rslora": True}],
    "different targets": [{}, {"target_modules": ["down_proj", "q_proj"], "r": 2}],
    "patterns and rslora": [
        {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
        {"use_rslora": True, "target_modules": "all-linear"},
    ],
    "chosen layers": [{"layers_to_transform": [0]}, {"layers_to_transform": [0, 2], "target_modules": ["v_proj"]}],
    "embedding and head": [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["lm_head", "embed_tokens"]},
    ],
}


@pytest.mark.parametrize(("case", "architecture"), each_value_once(MEMBERS, ["with a base", "without a base"]))
def test_peft_runs_the_combination_as_the_weighted_sum(
    case: str, architecture: str, tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model()
    members = [
        make_adapter(base, f"member{i}", seed=i, size=0.2, **settings) for i, settings in enumerate(MEMBERS[case])
    ]
    weights = [0.7, -0.4][: len(members)]
    known = open_checkpoint(base).architecture if architecture == "with a base" else None
    combine(list(zip(members, weights, strict=True)), tmp_path / "combined", known)
    run_merge(
        plan_merge(open_checkpoint(base), list(zip(members, weights, strict=True))), tmp_path / "merged", device=DEVICE
    )
    combined = PeftModel.from_pretrained(load_model(base), tmp_path / "combined").eval()
    with torch.no_grad():
        assert_close(combined(IDS).logits, load_model(tmp_path / "merged").eval()(IDS).logits, "logits")


def test_merging_a_combination_is_merging_its_members(
    tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model()
    members = [(make_adapter(base, "one"), 0.5), (make_adapter(base, "two", seed=2, use_rslora=True, r=6), 2.0)]
    combine(members, tmp_path / "combined")
    run_merge(plan_merge(open_checkpoint(base), members), tmp_path / "directly", device=DEVICE)
    run_merge(
        plan_merge(open_checkpoint(base), [(tmp_path / "combined", 1.0)]), tmp_path / "in two steps", device=DEVICE
    )
    directly = tensors_in(tmp_path / "directly")
    for name, tensor in tensors_in(tmp_path / "in two steps").items():
        assert_close(tensor, directly[name], name)


def test_short_target_names_stay_short_and_every_scale_is_one(
    tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model()
    report = combine(
        [(make_adapter(base, "one"), 1.0), (make_adapter(base, "two", r=8, target_modules=["o_proj"]), 1.0)],
        tmp_path / "out",
    )
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["target_modules"] == ["o_proj", "q_proj", "v_proj"]
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 4, False)
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert set(config["rank_pattern"].values()) == {8}
    assert report.ranks == {4: 6, 8: 3}


def test_a_head_saved_by_one_member_is_passed_through(
    tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model()
    saved = make_adapter(base, "saved", modules_to_save=["lm_head"])
    combine([(saved, 1.0), (make_adapter(base, "plain", seed=2), 0.5)], tmp_path / "out")
    ours, theirs = tensors_in(tmp_path / "out"), tensors_in(saved)
    assert torch.equal(ours["base_model.model.lm_head.weight"], theirs["base_model.model.lm_head.weight"])
    model = PeftModel.from_pretrained(load_model(base), tmp_path / "out")
    assert torch.equal(
        model.state_dict()["base_model.model.lm_head.modules_to_save.default.weight"],
        ours["base_model.model.lm_head.weight"],
    )


def test_biases_are_passed_through_where_peft_looks_for_them(
    tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model("gpt2")
    adapter = make_adapter(base, target_modules=["c_attn"], bias="lora_only")
    combine([(adapter, 1.0)], tmp_path / "out")
    with torch.no_grad():
        ours = PeftModel.from_pretrained(load_model(base), tmp_path / "out").eval()(IDS).logits
        theirs = PeftModel.from_pretrained(load_model(base), adapter).eval()(IDS).logits
    assert_close(ours, theirs, "logits")


@pytest.mark.parametrize("settings", [{}, {"rank": 8}, {"energy": 0.9}])
def test_a_trained_bias_is_refused_by_any_rank_and_merged(
    settings: dict[str, object], tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model("gpt2")
    adapter = make_adapter(base, target_modules=["c_attn"], lora_bias=True, fan_in_fan_out=True)
    checkpoint = open_checkpoint(base)
    with pytest.raises(NotSupported, match=r"attn\.c_attn\.bias") as caught:
        combine([(adapter, 1.0)], tmp_path / "out", checkpoint.architecture, settings=settings)
    assert (caught.value.code, caught.value.next_step) == ("bias_delta", "Merge it into the base.")
    assert not (tmp_path / "out").exists()
    run_merge(plan_merge(checkpoint, [(adapter, 1.0)]), tmp_path / "merged", device=DEVICE)
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(load_model(base), adapter).eval()(IDS).logits
        assert_close(load_model(tmp_path / "merged").eval()(IDS).logits, theirs, "logits")


def test_what_no_rank_can_hold_gets_no_advice_to_cut_it_to_one(
    tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model()
    adapter = make_adapter(base, use_dora=True)
    with pytest.raises(NotSupported, match="no LoRA can hold") as caught:
        combine([(adapter, 1.0)], tmp_path / "out", open_checkpoint(base).architecture)
    assert caught.value.next_step == "Merge it into the base, on whose values it depends."


def test_two_tensors_of_one_key_are_never_written() -> None:
    one = LowRank(
        module="layer",
        weight="layer.weight",
        layout=Layout.LINEAR,
        A=torch.ones(2, 4),
        B=torch.ones(4, 2),
        scale=1.0,
    )
    for deltas in (
        [one, replace(one, weight="layer.other")],
        [one, *(Replacement(module="layer", weight=f"{part}.scale", tensor=torch.ones(4)) for part in ("one", "two"))],
    ):
        with pytest.raises(NotSupported, match="would name two tensors") as caught:
            write_adapter(peft_form(deltas), Path("nowhere"), {}, {})
        assert (caught.value.code, "layer" in caught.value.subject) == ("two_for_one_key", True)


def test_a_weighted_replacement_is_refused(tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter) -> None:
    saved = make_adapter(make_model(), "saved", modules_to_save=["lm_head"])
    with pytest.raises(Mismatch, match="cannot scale") as caught:
        combine([(saved, 0.5)], tmp_path / "out")
    assert caught.value.subject == "lm_head"


def test_adapters_of_different_vocabularies_are_refused(
    tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    targets = ["lm_head", "q_proj"]
    small = make_adapter(make_model(), "small", target_modules=targets)
    large = make_adapter(make_model(name="other", vocabulary=80), "large", target_modules=targets)
    with pytest.raises(Mismatch, match="small: 64 x 16, large: 80 x 16") as caught:
        combine([(small, 1.0), (large, 1.0)], tmp_path / "out")
    assert (caught.value.code, caught.value.subject) == ("vocabulary_mismatch", "lm_head")


def test_an_adapter_of_another_model_names_the_module(
    tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    llama, gpt2 = make_model(), make_model("gpt2", name="other")
    adapter = make_adapter(gpt2, target_modules=["c_attn"])
    with pytest.raises(Mismatch, match=r"h\.0\.attn\.c_attn"):
        combine([(adapter, 1.0)], tmp_path / "out", open_checkpoint(llama).architecture)


def test_a_nan_in_a_factor_names_the_module(tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter) -> None:
    adapter = make_adapter(make_model())
    tensors = tensors_in(adapter)
    tensors["base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"][0, 0] = float("nan")
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(InvalidFile, match="NaN") as caught:
        combine([(adapter, 1.0)], tmp_path / "out")
    assert caught.value.subject == "model.layers.1.self_attn.v_proj"


@pytest.mark.parametrize(
    ("method", "settings", "says"),
    [
        ("averaging", {}, "Use one of stack, linear"),
        ("stack", {"density": 0.2}, "Known fields: lambda, tied, replacements"),
        ("linear", {"normalize": "perhaps"}, "'perhaps'"),
        ("stack", {"lambda": float("nan")}, "lambda is nan"),
        ("stack", {"tied": "maybe"}, "'maybe'"),
    ],
)
def test_unknown_methods_and_settings_name_the_known_ones(
    method: str,
    settings: dict[str, object],
    says: str,
    tmp_path: Path,
    make_model: MakeModel,
    make_adapter: MakeAdapter,
) -> None:
    adapter = make_adapter(make_model())
    with pytest.raises(NotSupported, match=says):
        combine([(adapter, 1.0)], tmp_path / "out", method=method, settings=settings)


@pytest.mark.parametrize("method", PIPELINES)
def test_every_setting_says_what_it_takes(method: str) -> None:
    """In our words, not in Python's."""
    for name in settings_of(method).field_names():
        for value in ("a1", "", [], {}, "nan", "1e400", 10**400):
            if name == "protect" and value == []:
                continue
            with pytest.raises(NotSupported, match=rf"The setting {name} is .* It is (a |one of|true or|the numbers)"):
                parse_settings(method, {name: value})


def test_weights_that_cancel_have_no_mean(tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter) -> None:
    adapter = make_adapter(make_model())
    with pytest.raises(Mismatch, match="mean"):
        combine([(adapter, 1.0), (adapter, -1.0)], tmp_path / "out", method="linear", settings={"normalize": True})


def test_an_existing_output_is_left_alone(tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter) -> None:
    adapter = make_adapter(make_model())
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").write_text("here before")
    with pytest.raises(RefusedOutput, match="exists"):
        combine([(adapter, 1.0)], tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a directory that nobody can write to")
def test_a_place_where_nothing_can_be_written_is_named(make_model: MakeModel, make_adapter: MakeAdapter) -> None:
    adapter = make_adapter(make_model())
    with pytest.raises(RefusedOutput, match="Nothing can be written to /proc: ") as caught:
        combine([(adapter, 1.0)], Path("/proc/out"))
    assert (caught.value.code, caught.value.subject) == ("not_writable", "/proc")


def test_a_head_that_weight_tying_wrapped_is_targeted_in_the_combination(
    tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model(tied=True)
    member = make_adapter(base, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    keys = tensors_in(member)
    assert any("lm_head.lora_A" in key for key in keys), sorted(keys)[:5]
    combine([(member, 1.0)], tmp_path / "combined", open_checkpoint(base).architecture)
    with torch.no_grad():
        alone = PeftModel.from_pretrained(load_model(base), member).eval()(IDS).logits
        combined = PeftModel.from_pretrained(load_model(base), tmp_path / "combined").eval()(IDS).logits
    assert_close(combined, alone, "logits")


def test_a_weight_that_makes_infinite_factors_is_refused_by_module(
    tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    with pytest.raises(RefusedOutput, match="infinite") as caught:
        combine([(make_adapter(make_model(), lora_alpha=10**30), 1e12)], tmp_path / "out")
    assert caught.value.code == "not_finite"
    assert caught.value.subject.endswith("_proj")
    assert not (tmp_path / "out").exists()


def test_two_directories_of_one_name_and_different_shapes_are_a_conflict(
    tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model()
    one, two = make_adapter(base, "a/same"), make_adapter(base, "b/same", target_modules=["q_proj"])
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    weights = tensors_in(two)
    save_file({**weights, key: torch.ones(20, 4)}, two / "adapter_model.safetensors")
    with pytest.raises(Mismatch) as caught:
        combine([(one, 1.0), (two, 1.0)], tmp_path / "out")
    assert caught.value.code == "shape_conflict"


def test_configs_that_differ_in_how_one_weight_is_stored_need_the_base(
    tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    """PEFT saves `fan_in_fan_out: false` where it wrapped a Linear as well, though GPT-2's c_attn is none."""
    base = make_model("gpt2", tied=True)
    used = [(make_adapter(base, "attention", target_modules=["c_attn"]), 1.0)]
    used += [(make_adapter(base, "head", target_modules=["c_attn", "lm_head"]), 1.0)]
    with pytest.raises(Mismatch, match=r"\(fan_in_fan_out\)") as caught:
        combine(used, tmp_path / "out")
    assert "--base" in caught.value.next_step
    combine(used, tmp_path / "out", open_checkpoint(base).architecture)


def test_a_tensor_saved_whole_is_refused_by_its_weight_after_lambda_and_normalize(
    tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model()
    members = [(make_adapter(base, "whole", modules_to_save=["lm_head"]), 1.0), (make_adapter(base, "other"), 1.0)]
    for method, settings in (("stack", {"lambda": 2.0}), ("linear", {"normalize": True})):
        with pytest.raises(Mismatch) as caught:
            combine(members, tmp_path / "out", method=method, settings=settings)
        assert caught.value.code == "weighted_replacement"
    combine([(members[0][0], 0.5)], tmp_path / "out", settings={"lambda": 2.0})


@pytest.mark.parametrize("method", ["stack", "svd"])
def test_an_input_that_is_replaced_meanwhile_is_refused_and_nothing_is_written(
    method: str, tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise its digest would be the new file's, and its numbers the old one's."""
    base = make_model()
    one, other = (make_adapter(base, name, seed=seed) for seed, name in enumerate("ab"))

    def replacing(*arguments: Any) -> Any:
        combined = combine_parsed(*arguments)
        new = shutil.copyfile(one / "adapter_model.safetensors", tmp_path / "new")
        new.replace(other / "adapter_model.safetensors")
        return combined

    monkeypatch.setattr("composer.export.combine.combine_parsed", replacing)
    with pytest.raises(RefusedOutput, match=r"b/adapter_model\.safetensors changed") as caught:
        combine([(one, 1.0), (other, 1.0)], tmp_path / "out", None, method)
    assert caught.value.code == "inputs_changed"
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []
