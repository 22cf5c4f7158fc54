"""An adapter that changes both sides of a tied weight equally: one change, whether merged or combined first."""

from pathlib import Path

import pytest
import torch

from composer.deltas.variants.load import load_deltas
from composer.errors import Mismatch
from composer.export.combine import combine
from composer.formats.checkpoints.checkpoint import open_checkpoint
from composer.formats.recipes.methods import PIPELINES
from composer.merge.plan import MergePlan, plan_merge
from composer.merge.run import run_merge
from tests.composer.adapted import logits, peft_logits, relative
from tests.composer.tiny import MakeAdapter, MakeModel, load_model, tensors_in
from tests.device import DEVICE
from tests.doses import each_value_once, one_of_each

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
PAIRS: dict[str, object] = {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}
RANDOM = sorted(name for name, pipeline in PIPELINES.items() if pipeline.random and not name.endswith("_svd"))


def both_sides_saved() -> dict[str, object]:
    """Made anew each time: PEFT removes tied names from the list that it receives."""
    return {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}


def merge(base: Path, adapters: list[Path], out: Path, method: str = "stack", **settings: object) -> MergePlan:
    plan = plan_merge(open_checkpoint(base), [(path, 1.0) for path in adapters], method, settings)
    run_merge(plan, out, device=DEVICE)
    return plan


def assert_same_sides(merged: Path, combined: Path) -> None:
    """`merged` is tied, and both sides of `combined` equal its single tensor."""
    tensors, sides = tensors_in(merged), tensors_in(combined)
    assert HEAD not in tensors
    for name in (HEAD, EMBEDDING):
        assert relative(sides[name], tensors[EMBEDDING]) <= 1e-5, name


@pytest.mark.parametrize(
    "method", [*one_of_each(RANDOM, lambda method: "della" in method), "ties", "knots_ties", "pico_core_ties"]
)
def test_what_is_combined_and_then_merged_is_what_is_merged_at_once(
    method: str, tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model(tied=True, shard="1GB")
    adapters = [make_adapter(base, f"a{seed}", seed=seed, **PAIRS) for seed in (1, 2)]
    settings: dict[str, object] = {"rank": 16, **({"seed": 5} if method in RANDOM else {})}
    assert merge(base, adapters, tmp_path / "merged", method, **settings).settings["tied"] == "shared"
    used = [(path, 1.0) for path in adapters]
    for name, architecture in (("known", open_checkpoint(base).architecture), ("unknown", None)):
        combine(used, tmp_path / name, architecture, method, settings)
        merge(base, [tmp_path / name], tmp_path / f"{name}-merged")
        merged, later = tensors_in(tmp_path / "merged"), tensors_in(tmp_path / f"{name}-merged")
        assert HEAD not in merged.keys() | later.keys()
        assert relative(later[EMBEDDING], merged[EMBEDDING]) <= 1e-5
    assert relative(logits(tmp_path / "merged"), peft_logits(base, tmp_path / "unknown")) <= 1e-5


@pytest.mark.parametrize(
    ("method", "other"),
    each_value_once(["stack", "ties", "dare_ties", "pico_core_ties", "knots_ties"], ["embed_tokens", "lm_head"]),
)
def test_twins_beside_a_change_of_one_side_are_combined_without_a_base_as_with_one(
    other: str, method: str, tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model(tied=True, shard="1GB")
    one_side = make_adapter(base, "one", seed=2, target_modules=["q_proj", other])
    used = [(make_adapter(base, "both", **PAIRS), 1.0), (one_side, 1.0)]
    settings: dict[str, object] = {} if method == "stack" else {"rank": 16}
    for name, architecture in (("known", open_checkpoint(base).architecture), ("unknown", None)):
        combine(used, tmp_path / name, architecture, method, settings)
    known, unknown = tensors_in(tmp_path / "known"), tensors_in(tmp_path / "unknown")
    assert known.keys() == unknown.keys()
    assert all(torch.equal(known[key], unknown[key]) for key in known)


def test_largest_entries_of_a_whole_model_are_counted_once_of_twins(
    tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model(tied=True, shard="1GB")
    adapter = make_adapter(base, **PAIRS)
    settings: dict[str, object] = {"rank": 16, "scope": "model", "density": 0.3}
    merge(base, [adapter], tmp_path / "merged", "magnitude_prune", **settings)
    merge(base, [adapter], tmp_path / "untied", "magnitude_prune", tied="untie", **settings)
    combine([(adapter, 1.0)], tmp_path / "combined", open_checkpoint(base).architecture, "magnitude_prune", settings)
    merge(base, [tmp_path / "combined"], tmp_path / "later")
    assert_same_sides(tmp_path / "merged", tmp_path / "untied")
    assert relative(tensors_in(tmp_path / "later")[EMBEDDING], tensors_in(tmp_path / "merged")[EMBEDDING]) <= 1e-5


def test_without_a_base_pairs_that_differ_are_two_whatever_the_config_says(
    tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    """PEFT only warns where `ensure_weight_tying` meets a model that is not tied."""
    targets = ["q_proj", "embed_tokens", "lm_head"]
    adapter = make_adapter(make_model(), target_modules=targets, ensure_weight_tying=True)
    assert not any(delta.tied or delta.twin for delta in load_deltas(adapter, None).deltas)
    combine([(adapter, 1.0)], tmp_path / "combined")
    assert tensors_in(tmp_path / "combined").keys() >= {
        "base_model.model.lm_head.lora_A.weight", "base_model.model.model.embed_tokens.lora_embedding_A",
    }  # fmt: skip


@pytest.mark.parametrize(
    "own", [{"use_dora": True}, {"alpha_pattern": {"embed_tokens": 1}}], ids=["magnitudes", "scale"]
)
def test_sides_of_one_pair_and_another_magnitude_or_scale_are_no_twins(
    own: dict[str, object], tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model(tied=True, shard="1GB")
    adapter = make_adapter(base, **PAIRS, **own)
    assert merge(base, [adapter], tmp_path / "merged").settings["tied"] == "untie"
    assert relative(logits(tmp_path / "merged"), peft_logits(base, adapter)) <= 1e-5


def test_a_tensor_that_is_saved_whole_as_both_sides_stays_tied(
    tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model(tied=True, shard="1GB")
    adapter = make_adapter(base, **both_sides_saved(), ensure_weight_tying=True)
    plan = merge(base, [adapter], tmp_path / "merged")
    assert HEAD not in tensors_in(tmp_path / "merged")
    assert load_model(tmp_path / "merged").config.tie_word_embeddings
    assert not {finding.code for finding in plan.findings} & {"tied_untied", "tied_shared"}
    assert relative(logits(tmp_path / "merged"), peft_logits(base, adapter)) <= 1e-6
    merge(base, [adapter], tmp_path / "untied", tied="untie")
    assert_same_sides(tmp_path / "merged", tmp_path / "untied")
    combine([(adapter, 1.0)], tmp_path / "combined", open_checkpoint(base).architecture)
    merge(base, [tmp_path / "combined"], tmp_path / "later")
    assert HEAD not in tensors_in(tmp_path / "later")
    assert relative(logits(tmp_path / "later"), peft_logits(base, adapter)) <= 1e-6


@pytest.mark.parametrize("method", ["stack", "dare_linear"])
def test_a_tensor_that_is_saved_whole_as_both_sides_is_one_difference(
    method: str, tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model(tied=True, shard="1GB")
    adapter = make_adapter(base, **both_sides_saved(), ensure_weight_tying=True)
    for tied in ("auto", "shared", "untie"):
        plan = merge(base, [adapter], tmp_path / tied, method, tied=tied, replacements="delta")
        assert plan.settings["tied"] == ("untie" if tied == "untie" else "shared")
    assert relative(tensors_in(tmp_path / "shared")[EMBEDDING], tensors_in(tmp_path / "auto")[EMBEDDING]) == 0
    assert_same_sides(tmp_path / "auto", tmp_path / "untie")


def test_tensors_saved_whole_that_differ_untie_the_sides(
    tmp_path: Path, make_model: MakeModel, make_adapter: MakeAdapter
) -> None:
    base = make_model(tied=True, shard="1GB")
    adapter = make_adapter(base, **both_sides_saved())
    assert merge(base, [adapter], tmp_path / "merged").settings["tied"] == "untie"
    assert relative(logits(tmp_path / "merged"), peft_logits(base, adapter)) <= 1e-6
    with pytest.raises(Mismatch, match="only possible with tied=untie") as caught:
        plan_merge(open_checkpoint(base), [(adapter, 1.0)], settings={"tied": "shared"})
    assert caught.value.code == "tied_both_sides"
