"""Combinations of adapters with fused experts or packed attention: they load in PEFT, and merge as their members."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from composer.errors import NotSupported
from composer.export.combine import CombineReport, combine
from composer.formats.checkpoints.checkpoint import open_checkpoint
from composer.formats.recipes.weights import Weight, parse_rule
from composer.merge.plan import plan_merge
from composer.merge.run import run_merge
from tests.composer.adapted import (
    architecture_of,
    assert_all_close,
    changed_by,
    logits,
    peft_logits,
    relative,
    save_adapted,
    save_adapted_layers,
)
from tests.composer.deltas.test_variants_experts import DOWN, GATE, gpt_oss, lora, mixtral, qwen3, save_base
from tests.composer.deltas.test_variants_lora import Layers
from tests.composer.handmade import random_factors, write_adapter
from tests.composer.tiny import tensors_in
from tests.device import DEVICE
from tests.doses import each_value_once

MODELS = {"Mixtral": mixtral, "Qwen3-MoE": qwen3, "GPT-OSS": gpt_oss}
METHODS: dict[str, dict[str, object]] = {
    "stack": {}, "svd": {"rank": 3}, "ties": {"rank": 4, "density": 0.5}, "core_tsv": {}, "knots_ties": {},
}  # fmt: skip
Members = list[tuple[Path, Weight | float]]


def members_of(base: Path, tmp_path: Path) -> Members:
    """Two members with different ranks, one of them on some of the other's modules."""
    settings: list[dict[str, Any]] = [{"r": 2, "lora_alpha": 3}, {"r": 3, "use_rslora": True}]
    targets = [(GATE, DOWN), (DOWN,)]
    return [
        (save_adapted(base, lora(*targets[i], **settings[i]), tmp_path / f"member{i}", seed=i + 1), weight)
        for i, weight in enumerate((0.7, -0.4))
    ]


def merged(base: Path, members: Members, out: Path, method: str = "stack", **settings: object) -> Path:
    run_merge(plan_merge(open_checkpoint(base), members, method, settings), out, device=DEVICE)
    return out


def assert_the_same(base: Path, members: Members, tmp_path: Path, method: str, **settings: object) -> CombineReport:
    """PEFT with the combination, a merge of the combination, and a merge of the members are one model."""
    combined, known = tmp_path / "combined", open_checkpoint(base).architecture
    report = combine(members, combined, known, method, settings)
    direct = merged(base, members, tmp_path / "directly", method, **settings)
    twice = merged(base, [(combined, 1.0)], tmp_path / "in two steps")
    assert_all_close(tensors_in(twice), tensors_in(direct), 1e-6)
    assert relative(peft_logits(base, combined), logits(direct)) <= 1e-5
    return report


@pytest.mark.parametrize(("model", "method"), each_value_once(MODELS, METHODS))
def test_stacks_of_experts_are_combined_and_packed_again(model: str, method: str, tmp_path: Path) -> None:
    base = save_base(MODELS[model](), tmp_path / "base")
    report = assert_the_same(base, members_of(base, tmp_path), tmp_path, method, **METHODS[method])
    assert report.modules == 6  # q_proj and two stacks, in two layers
    config = json.loads((tmp_path / "combined/adapter_config.json").read_text())
    assert (config["target_modules"], config["target_parameters"]) == (["q_proj"], [DOWN, GATE])


def test_a_sum_shares_the_inputs_of_gate_and_up_and_keeps_its_rank(tmp_path: Path) -> None:
    """The checkpoint splits what PEFT trained as one: concatenation would double the rank."""
    base = save_base(mixtral(), tmp_path / "base")
    report = assert_the_same(base, members_of(base, tmp_path), tmp_path, "stack")
    assert report.ranks == {5: 4, 2: 2}


def test_stacks_are_packed_without_a_base_too(tmp_path: Path) -> None:
    base = save_base(qwen3(), tmp_path / "base")
    members = members_of(base, tmp_path)
    combine(members, tmp_path / "combined")
    direct = merged(base, members, tmp_path / "directly")
    assert relative(peft_logits(base, tmp_path / "combined"), logits(direct)) <= 1e-5


@pytest.mark.parametrize(
    ("method", "settings"),
    [("tsv", {}), ("knots_ties", {}), ("core_ties", {}), ("svd", {"rank": 3}), ("stack", {"rank": 3})],
)
def test_what_is_more_than_a_sum_of_stacks_needs_the_base(
    method: str, settings: dict[str, object], tmp_path: Path
) -> None:
    """A checkpoint that separates gate and up has two slots where the adapters have one."""
    base = save_base(mixtral(), tmp_path / "base")
    with pytest.raises(NotSupported, match=r"down_proj is a stack of experts") as caught:
        combine(members_of(base, tmp_path)[1:], tmp_path / "combined", None, method, settings)
    assert (caught.value.code, "--base" in caught.value.next_step) == ("needs_base", True)


def test_experts_and_parts_of_experts_that_are_left_out_are_zero(tmp_path: Path) -> None:
    """The last expert, parts of another, and the stack of one layer, which a rule can name as PEFT does."""
    base = save_base(mixtral(), tmp_path / "base")
    rules = tuple(parse_rule(f"{glob}=0") for glob in ("experts.3.*", "experts.1.w2", "1/down_proj"))
    gate = parse_rule("experts.1.w1=0")
    (one, _), (other, _) = members_of(base, tmp_path)
    assert_the_same(base, [(one, Weight(1.0, (gate, *rules))), (other, Weight(2.0, rules))], tmp_path, "stack")
    config = json.loads((tmp_path / "combined/adapter_config.json").read_text())
    assert config["target_parameters"] == [f"model.layers.{at}" for at in (f"0.{DOWN}", f"0.{GATE}", f"1.{GATE}")]


def test_a_router_is_a_stack_of_one(tmp_path: Path) -> None:
    base = save_base(mixtral(), tmp_path / "base")
    router = save_adapted(base, lora("mlp.gate.weight", target_modules=[]), tmp_path / "router")
    assert_the_same(base, [(router, 0.5), *members_of(base, tmp_path)], tmp_path, "stack")


def separate(directory: Path) -> Path:
    """Every expert of a layer as a separate module, as they were trained before stacks existed."""
    sides = {"w1": (24, 16), "w3": (24, 16), "w2": (16, 24)}
    names = [
        (f"model.layers.1.block_sparse_moe.experts.{e}.{name}", size) for e in range(4) for name, size in sides.items()
    ]
    factors = {name: random_factors(at, *size, rank=3) for at, (name, size) in enumerate(names)}
    write_adapter(directory, factors, dtype=torch.float32, target_modules=list(sides), lora_alpha=1)
    return directory


@pytest.mark.parametrize("order", [1, -1])
def test_separate_experts_and_stacks_are_combined_in_the_first_ones_way(order: int, tmp_path: Path) -> None:
    base = save_base(mixtral(), tmp_path / "base")
    new = save_adapted(base, lora(GATE, DOWN), tmp_path / "new")
    members: Members = [(new, 1.0), (separate(tmp_path / "old"), 0.5)]
    assert_the_same(base, members[::order], tmp_path, "stack")


def test_shares_of_the_energy_give_a_stack_the_rank_of_its_largest_expert(tmp_path: Path) -> None:
    base = save_base(gpt_oss(), tmp_path / "base")
    report = assert_the_same(base, members_of(base, tmp_path), tmp_path, "svd", energy=0.8)
    ranks = [
        compression.rank
        for compression in report.compressions
        if "down_proj" in compression.module and ".0." in compression.module
    ]
    assert len(set(ranks)) > 1
    assert max(ranks) in report.ranks


def test_an_expert_of_its_own_beside_a_stack_is_refused_by_name(tmp_path: Path) -> None:
    base = save_base(mixtral(), tmp_path / "base")
    name = "model.layers.1.block_sparse_moe.experts.2.w3"
    write_adapter(
        tmp_path / "old", {name: random_factors(1, outputs=24, inputs=16, rank=3)}, target_modules=["w3"], lora_alpha=6
    )
    members: Members = [(tmp_path / "old", 1.0), (save_adapted(base, lora(GATE), tmp_path / "new"), 1.0)]
    with pytest.raises(NotSupported, match="stacked") as caught:
        combine(members, tmp_path / "combined", open_checkpoint(base).architecture)
    assert (caught.value.subject, caught.value.next_step) == (name, "Merge them into the base.")
    merged(base, members, tmp_path / "merged")


@pytest.mark.parametrize("known", [True, False])
def test_packed_attention_is_combined_as_peft_merges_it(known: bool, tmp_path: Path) -> None:
    """Both projections have one rank in PEFT, which applies the output's pair twice."""
    torch.manual_seed(3)
    before = Layers().state_dict()
    wanted = dict(before)
    for number, (rank, weight) in enumerate(((2, 0.5), (3, 2.0))):
        layers = Layers()
        layers.load_state_dict(before)
        merged = save_adapted_layers(layers, lora(target_modules=["attention"], r=rank), tmp_path / str(number))
        wanted = {name: wanted[name] + weight * (merged[name] - before[name]) for name in before}
    architecture = architecture_of(before) if known else None
    report = combine([(tmp_path / "0", 0.5), (tmp_path / "1", 2.0)], tmp_path / "combined", architecture)
    assert report.ranks == {5: 1}
    plain = Layers()
    plain.load_state_dict(before)
    ours = PeftModel.from_pretrained(plain, tmp_path / "combined").merge_and_unload().state_dict()
    assert_all_close(ours, wanted, 1e-6)
    assert_all_close(changed_by(Layers(), before, tmp_path / "combined"), wanted, 1e-6)
