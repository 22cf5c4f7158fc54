"""Merges equal PEFT's own, tensor by tensor, for every supported kind of adapter."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file

from composer.errors import Mismatch, RefusedOutput
from composer.formats.checkpoints.checkpoint import open_checkpoint
from composer.merge.plan import MergePlan, plan_merge
from composer.merge.run import run_merge
from tests.composer.tiny import MakeAdapter, MakeModel, assert_close, load_model, tensors_in
from tests.device import DEVICE

LLAMA_CASES: dict[str, dict[str, object]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "every linear layer": {"target_modules": "all-linear"},
    "a regex of targets": {"target_modules": r".*layers\.[01]\.mlp\.(up|down)_proj"},
    "some layers only": {"layers_to_transform": [1]},
    "more directions than are added at once": {"r": 150, "target_modules": ["q_proj", "down_proj"]},
    "rank and alpha patterns": {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, "down_proj": 6},
        "alpha_pattern": {"layers.0.self_attn.v_proj": 32, "down_proj": 3},
    },
    "a rank pattern under rslora": {"use_rslora": True, "rank_pattern": {"v_proj": 8}},
    "the embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "the head": {"target_modules": ["lm_head", "v_proj"]},
    "a head saved whole": {"modules_to_save": ["lm_head"]},
    "norms saved whole": {"modules_to_save": ["norm"]},
}
GPT2_CASES: dict[str, dict[str, object]] = {
    "conv1d": {"target_modules": ["c_attn"]},
    "conv1d, square": {"target_modules": [r"attn.c_proj"]},
    "conv1d with biases": {"target_modules": ["c_attn", "c_fc"], "bias": "lora_only"},
    "all biases": {"target_modules": ["c_fc"], "bias": "all"},
    "conv1d and embedding": {"target_modules": ["c_attn", "wte"]},
}


def peft_merged(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    model = PeftModel.from_pretrained(load_model(base), adapter).merge_and_unload()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def merge(base: Path, adapters: Sequence[tuple[Path, float]], out: Path, **options: object) -> MergePlan:
    plan = plan_merge(open_checkpoint(base), adapters, **options)  # pyright: ignore[reportArgumentType]
    run_merge(plan, out, device=DEVICE)
    return plan


@pytest.mark.parametrize("case", LLAMA_CASES)
def test_a_merge_into_llama_equals_pefts_own(
    case: str, tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model()
    adapter = make_adapter(base, **LLAMA_CASES[case])
    _assert_equals_peft(base, adapter, tmp_path / "merged")


@pytest.mark.parametrize("case", GPT2_CASES)
def test_a_merge_into_gpt2_equals_pefts_own(
    case: str, tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model("gpt2")
    adapter = make_adapter(base, fan_in_fan_out=True, **GPT2_CASES[case])
    _assert_equals_peft(base, adapter, tmp_path / "merged")


def _assert_equals_peft(base: Path, adapter: Path, out: Path) -> None:
    plan = merge(base, [(adapter, 1.0)], out)
    expected, before, merged = peft_merged(base, adapter), tensors_in(base), tensors_in(out)
    assert merged.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], merged[name])}
    assert changed
    assert changed <= set(plan.touched)
    for name, tensor in load_model(out).state_dict().items():
        assert_close(tensor, expected[name], name)


def test_untouched_tensors_and_shards_are_byte_identical(
    tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model(dtype=torch.bfloat16, shard="4KB")
    plan = merge(base, [(make_adapter(base, layers_to_transform=[0]), 1.0)], tmp_path / "merged")
    copied = [shard.file for shard in plan.shards if not shard.rewritten]
    assert copied
    for file in copied:
        assert (base / file).read_bytes() == (tmp_path / "merged" / file).read_bytes()
    before, after = tensors_in(base), tensors_in(tmp_path / "merged")
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(plan.touched)


def test_weights_scale_adapters_and_several_add_up(
    tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model(shard="1GB")
    one = make_adapter(base, "one", seed=1)
    two = make_adapter(base, "two", seed=2, r=8, use_rslora=True, target_modules=["q_proj", "up_proj"])
    merge(base, [(one, 0.5), (two, -1.5)], tmp_path / "merged")
    weights, merged_one, merged_two = tensors_in(base), peft_merged(base, one), peft_merged(base, two)
    for name, tensor in tensors_in(tmp_path / "merged").items():
        W = weights[name].double()
        assert_close(tensor, W + 0.5 * (merged_one[name].double() - W) - 1.5 * (merged_two[name].double() - W), name)


def test_a_normalized_sum_divides_by_all_weights(
    tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model()
    one, two = make_adapter(base, "one", seed=1), make_adapter(base, "two", seed=2, target_modules=["q_proj"])
    merge(base, [(one, 3.0), (two, 1.0)], tmp_path / "merged", method="linear", settings={"normalize": "true"})
    merge(base, [(one, 0.75), (two, 0.25)], tmp_path / "stacked")
    stacked = tensors_in(tmp_path / "stacked")
    for name, tensor in tensors_in(tmp_path / "merged").items():
        assert_close(tensor, stacked[name], name)


def test_a_bf16_merge_rounds_once(tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter) -> None:
    base = make_model(dtype=torch.bfloat16)
    adapter = make_adapter(base)
    plan = merge(base, [(adapter, 1.0)], tmp_path / "merged")
    expected, merged = peft_merged(base, adapter), tensors_in(tmp_path / "merged")
    for name in plan.touched:
        assert merged[name].dtype is torch.bfloat16
        error = (merged[name].double() - expected[name].double()).abs()
        assert bool((error <= expected[name].double().abs() * 2**-8 * 1.001 + 1e-7).all())


def test_a_cast_rewrites_every_float_tensor_and_says_so_in_the_config(
    tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model()
    plan = merge(base, [(make_adapter(base), 1.0)], tmp_path / "merged", dtype="bf16")
    before, after = tensors_in(base), tensors_in(tmp_path / "merged")
    for name in before.keys() - set(plan.touched):
        assert torch.equal(after[name], before[name].bfloat16())
    assert open_checkpoint(tmp_path / "merged").config["dtype"] == "bfloat16"


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"]])
def test_a_tied_weight_is_refused_where_it_is_asked_for(
    targets: list[str], tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model(tied=True)
    adapter = make_adapter(base, target_modules=targets)
    with pytest.raises(Mismatch, match="tied=untie") as caught:
        merge(base, [(adapter, 1.0)], tmp_path / "merged", settings={"tied": "refuse"})
    assert caught.value.code == "tied_weight"
    assert caught.value.subject.endswith(targets[0])
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("targets", [["lm_head", "q_proj"], ["embed_tokens", "q_proj"]])
def test_tied_shared_is_pefts_behaviour(
    targets: list[str], tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model(tied=True)
    adapter = make_adapter(base, target_modules=targets)
    merge(base, [(adapter, 1.0)], tmp_path / "merged", settings={"tied": "shared"})
    expected = peft_merged(base, adapter)
    for name, tensor in load_model(tmp_path / "merged").state_dict().items():
        assert_close(tensor, expected[name], name)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("side", ["head", "embedding", "both"])
@pytest.mark.parametrize("settings", [{}, {"tied": "untie"}], ids=["by itself", "by the setting"])
def test_untied_the_merged_model_is_the_adapted_model(
    kind: str, side: str, settings: dict[str, object], tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model(kind, tied=True)
    embedding = "wte" if kind == "gpt2" else "embed_tokens"
    targets = {"head": ["lm_head"], "embedding": [embedding], "both": ["lm_head", embedding]}[side]
    adapter = make_adapter(base, target_modules=targets)
    plan = merge(base, [(adapter, 1.0)], tmp_path / "merged", settings=settings)
    ids = torch.arange(20).reshape(2, 10)
    adapted = PeftModel.from_pretrained(load_model(base), adapter).eval()
    merged = load_model(tmp_path / "merged").eval()
    assert not merged.config.tie_word_embeddings
    assert "tied_untied" in {finding.code for finding in plan.findings}
    with torch.no_grad():
        assert_close(merged(ids).logits, adapted(ids).logits, "logits")


def test_a_tied_weight_that_takes_no_part_stays_tied(
    tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model(tied=True)
    head = make_adapter(base, name="head", target_modules=["lm_head"])
    other = make_adapter(base, name="other", target_modules=["q_proj"])
    merge(base, [(head, 0.0), (other, 1.0)], tmp_path / "with")
    merge(base, [(other, 1.0)], tmp_path / "without")
    assert load_model(tmp_path / "with").config.tie_word_embeddings
    actual, expected = tensors_in(tmp_path / "with"), tensors_in(tmp_path / "without")
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_a_language_model_within_a_model_is_said_to_be_untied_and_cast_too(
    tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model(tied=True)
    adapter = make_adapter(base, target_modules=["lm_head"])
    config = json.loads((base / "config.json").read_text())
    config["text_config"] = {"tie_word_embeddings": True, "dtype": "float32", "hidden_size": 16}
    config["vision_config"] = {"hidden_size": 8}
    (base / "config.json").write_text(json.dumps(config))
    merge(base, [(adapter, 1.0)], tmp_path / "merged", settings={"tied": "untie"}, dtype="bf16")
    written = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert written["text_config"] == {"tie_word_embeddings": False, "dtype": "bfloat16", "hidden_size": 16}
    assert written["vision_config"] == {"hidden_size": 8}
    assert written["tie_word_embeddings"] is False


def test_a_gpt2_checkpoint_without_the_transformer_prefix_is_found(
    tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model("gpt2", shard="1GB")
    adapter = make_adapter(base, target_modules=["c_attn"])
    expected = peft_merged(base, adapter)
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors_in(base).items()}
    save_file(bare, base / "model.safetensors", {"format": "pt"})
    merge(base, [(adapter, 1.0)], tmp_path / "merged")
    merged = tensors_in(tmp_path / "merged")
    assert_close(merged["h.0.attn.c_attn.weight"], expected["transformer.h.0.attn.c_attn.weight"], "c_attn")


def test_two_different_heads_are_a_conflict_and_equal_ones_are_not(
    tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model()
    one, two = (
        make_adapter(base, name, seed=seed, modules_to_save=["lm_head"]) for name, seed in (("one", 1), ("two", 2))
    )
    with pytest.raises(Mismatch, match=r"one and two both save all of lm_head\.weight") as caught:
        merge(base, [(one, 1.0), (two, 1.0)], tmp_path / "merged")
    assert caught.value.code == "replacement_conflict"
    merge(base, [(one, 1.0), (one, 1.0)], tmp_path / "merged")


def test_a_saved_head_and_a_delta_on_it_are_a_conflict(
    tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model()
    full, pair = (
        make_adapter(base, "whole", modules_to_save=["lm_head"]),
        make_adapter(base, "pair", target_modules=["lm_head"]),
    )
    with pytest.raises(Mismatch, match=r"whole replaces lm_head\.weight and pair adds to it"):
        merge(base, [(full, 1.0), (pair, 1.0)], tmp_path / "merged")


def test_an_embedding_adapter_of_another_base_is_refused(
    tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model()
    adapter = make_adapter(base, target_modules=["embed_tokens"])
    other = make_model(name="other")
    weights = {name: tensor + 1 for name, tensor in tensors_in(other).items()}
    model = load_model(other)
    model.load_state_dict(weights)
    model.save_pretrained(other, max_shard_size="1GB")
    for stale in [*other.glob("model-*"), *other.glob("*.index.json")]:
        stale.unlink()
    with pytest.raises(Mismatch, match="trained on another base"):
        merge(other, [(adapter, 1.0)], tmp_path / "merged")


def test_a_nan_of_the_base_is_reported_as_the_bases(
    tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model()
    adapter = make_adapter(base)
    model = load_model(base)
    with torch.no_grad():
        model.get_parameter("model.layers.0.self_attn.q_proj.weight")[0, 0] = float("nan")
    shutil.rmtree(base)
    model.save_pretrained(base)
    with pytest.raises(RefusedOutput, match="in the base") as caught:
        merge(base, [(adapter, 1.0)], tmp_path / "merged")
    assert caught.value.subject == "model.layers.0.self_attn.q_proj.weight"


def test_a_value_too_large_for_fp16_names_the_tensor(
    tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model()
    with pytest.raises(RefusedOutput, match="self_attn") as caught:
        merge(base, [(make_adapter(base, size=0.3), 1e7)], tmp_path / "merged", dtype="fp16")
    assert caught.value.code == "not_finite"
    assert [path.name for path in tmp_path.iterdir() if "merged" in path.name] == []
