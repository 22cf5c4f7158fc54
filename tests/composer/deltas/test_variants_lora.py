"""LoRA's variants on every kind of layer, merged as PEFT merges them; and combinations of two that are impossible."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from torch import nn

from composer.deltas.delta import RowwiseDelta
from composer.deltas.variants.load import load_deltas
from composer.errors import Mismatch, NotSupported
from composer.evaluation.hooks import deltas_applied
from composer.export.convert import convert_rebased
from composer.formats.adapters.facts import read_adapter
from composer.formats.adapters.placement.placement import place
from composer.formats.checkpoints.checkpoint import open_checkpoint
from composer.formats.recipes.weights import Weight, parse_rule
from composer.merge.plan import plan_merge
from composer.merge.run import run_merge
from tests.composer.adapted import (
    IDS,
    assert_all_close,
    assert_merged_like_peft,
    assert_rows_follow_the_device,
    change_config,
    change_tensors,
    changed_by,
    logits,
    merge,
    peft_logits,
    peft_merged,
    relative,
    save_adapted,
    save_adapted_layers,
)
from tests.composer.tiny import MakeModel, load_model, tensors_in
from tests.device import DEVICE

DORA: dict[str, Any] = {"use_dora": True}
PATTERNS = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 5}}
BLOCKS = BdLoraConfig(target_modules_bd_a=["q_proj"], target_modules_bd_b=["down_proj"], nblocks=2, match_strict=False)

# case -> (kind of model, config of the adapter, largest relative error)
CASES: dict[str, tuple[str, dict[str, Any], float]] = {
    "DoRA": ("llama", DORA, 1e-6),
    "DoRA with patterns, rsLoRA": ("llama", {**DORA, **PATTERNS, "use_rslora": True}, 1e-6),
    "DoRA on every linear layer": ("llama", {**DORA, "target_modules": "all-linear"}, 1e-6),
    "DoRA on the embedding and the head": (
        "llama", {**DORA, "target_modules": ["embed_tokens", "lm_head", "q_proj"]}, 1e-6,
    ),
    "DoRA on Conv1D": ("gpt2", {**DORA, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}, 1e-6),
    "a bias of B": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "lora_bias": True}, 1e-6),
    "trained tokens": ("llama", {"trainable_token_indices": [9, 1, 40]}, 1e-6),
    "trained tokens by name": ("llama", {"trainable_token_indices": {"embed_tokens": [3], "lm_head": [5, 2]}}, 1e-6),
    "DoRA and trained tokens": ("llama", {**DORA, "trainable_token_indices": [9, 1]}, 1e-6),
    "block-diagonal factors": (
        "llama", {"target_modules": ["q_proj", "v_proj", "down_proj"], "use_bdlora": BLOCKS}, 1e-6,
    ),
    "VeLoRA": ("llama", {"velora_config": VeloraConfig()}, 1e-6),
    "MonteCLoRA": ("llama", {"monteclora_config": MontecloraConfig()}, 1e-6),
    "MiCA": ("llama", {"init_lora_weights": "mica"}, 1e-6),
    # The base is decomposed: LAPACK in float32 is right to a few units of the last place of the largest value.
    "KaSA": ("llama", {"kasa_config": KasaConfig()}, 1e-5),
}  # fmt: skip


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], **settings})


@pytest.mark.parametrize("case", CASES)
def test_a_merge_equals_pefts_own_and_rows_are_computed_where_the_weight_is(
    case: str, accelerator: str, tmp_path: Path, make_model: MakeModel
) -> None:
    kind, settings, tolerance = CASES[case]
    base = make_model(kind, shard="1GB")
    adapter = save_adapted(base, lora(**settings), tmp_path / "adapter")
    assert_merged_like_peft(base, adapter, tmp_path / "merged", tolerance)
    for delta in load_deltas(adapter, open_checkpoint(base).architecture).deltas:
        if isinstance(delta, RowwiseDelta):
            assert_rows_follow_the_device(delta, accelerator)


@pytest.mark.parametrize("case", ["DoRA on every linear layer", "DoRA on Conv1D", "a bias of B", "trained tokens"])
def test_a_delta_on_a_loaded_model_is_the_adapter_itself(case: str, tmp_path: Path, make_model: MakeModel) -> None:
    kind, settings, _ = CASES[case]
    base = make_model(kind, shard="1GB")
    adapter = save_adapted(base, lora(**settings), tmp_path / "adapter")
    model = load_model(base).eval()
    with torch.no_grad(), deltas_applied(model, load_deltas(adapter, open_checkpoint(base).architecture).deltas):
        assert relative(model(IDS).logits, peft_logits(base, adapter)) <= 1e-5


class Layers(nn.Module):
    """Layers that none of the language models in these tests has."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(4, 6, 3)
        self.two = nn.Conv2d(4, 6, (3, 2))
        self.three = nn.Conv3d(3, 5, (1, 2, 2))
        self.point = nn.Conv2d(4, 6, 1)
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x)[0]


CONVOLUTIONS = ["one", "two", "three", "point"]


@pytest.mark.parametrize(("targets", "use_dora"), [(CONVOLUTIONS, False), (CONVOLUTIONS, True), (["attention"], False)])
def test_convolutions_and_attention_change_as_in_peft(targets: list[str], use_dora: bool, tmp_path: Path) -> None:
    torch.manual_seed(3)
    layers = Layers()
    before = {name: tensor.clone() for name, tensor in layers.state_dict().items()}
    merged = save_adapted_layers(layers, lora(target_modules=targets, use_dora=use_dora), tmp_path / "adapter")
    plain = Layers()
    changed = changed_by(plain, before, tmp_path / "adapter")
    assert_all_close(changed, merged, 1e-6)
    assert any(not torch.equal(changed[name], before[name]) for name in before)
    assert all(torch.equal(plain.state_dict()[name], before[name]) for name in before)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_tokens_of_a_tied_embedding_change_both_sides(kind: str, tmp_path: Path, make_model: MakeModel) -> None:
    base = make_model(kind, tied=True, shard="1GB")
    targets = ["c_attn"] if kind == "gpt2" else ["q_proj"]
    adapter = save_adapted(base, lora(trainable_token_indices=[4, 11], target_modules=targets), tmp_path / "adapter")
    merge(base, adapter, tmp_path / "merged")
    merge(base, adapter, tmp_path / "untied", tied="untie")
    expected = peft_logits(base, adapter)
    for out in ("merged", "untied"):
        assert relative(logits(tmp_path / out), expected) <= 1e-5
    assert load_model(tmp_path / "merged").config.tie_word_embeddings
    model = load_model(base).eval()
    with torch.no_grad(), deltas_applied(model, load_deltas(adapter, open_checkpoint(base).architecture).deltas):
        assert relative(model(IDS).logits, expected) <= 1e-5


def test_a_pair_that_both_sides_of_a_tied_weight_share_is_added_once(tmp_path: Path, make_model: MakeModel) -> None:
    """PEFT 0.21 adds it twice when it merges; the adapted model is the truth."""
    base = make_model(tied=True, shard="1GB")
    config = lora(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    adapter = save_adapted(base, config, tmp_path / "adapter")
    merge(base, adapter, tmp_path / "merged")
    merge(base, adapter, tmp_path / "untied", tied="untie")
    for out in ("merged", "untied"):
        assert relative(logits(tmp_path / out), peft_logits(base, adapter)) <= 1e-5


@pytest.mark.parametrize("rule", ["lm_head=0.5", "lm_head=0", "embed_tokens=0"])
@pytest.mark.parametrize(
    "changes", [{"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, {"trainable_token_indices": [4, 11]}]
)
def test_sides_that_rules_weigh_differently_are_untied(
    rule: str, changes: dict[str, object], tmp_path: Path, make_model: MakeModel
) -> None:
    base = make_model(tied=True, shard="1GB")
    adapter = save_adapted(base, lora(**{"target_modules": ["q_proj"], **changes}), tmp_path / "adapter")
    weight, checkpoint = Weight(1.0, (parse_rule(rule),)), open_checkpoint(base)
    merged, apart = tmp_path / "merged", tmp_path / "apart"
    plan = plan_merge(checkpoint, [(adapter, weight)])
    run_merge(plan, merged, device=DEVICE)
    run_merge(plan_merge(checkpoint, [(adapter, weight)], settings={"tied": "untie"}), apart, device=DEVICE)
    assert "tied_untied" in {finding.code for finding in plan.findings}
    assert plan.settings["tied"] == "untie"
    expected, actual = tensors_in(apart), tensors_in(merged)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    head, embedding = (expected[name] for name in ("lm_head.weight", "model.embed_tokens.weight"))
    assert not torch.equal(head, embedding)
    with pytest.raises(Mismatch) as caught:
        plan_merge(checkpoint, [(adapter, weight)], settings={"tied": "refuse"})
    assert caught.value.code in ("tied_weight", "token_conflict")


def test_sides_that_are_said_to_share_a_pair_must_have_the_same(tmp_path: Path, make_model: MakeModel) -> None:
    base = make_model(tied=True)
    config = lora(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    adapter = save_adapted(base, config, tmp_path / "adapter")
    change_tensors(adapter, lambda tensors: {n: t + 1 if "lm_head.lora_A" in n else t for n, t in tensors.items()})
    with pytest.raises(Mismatch, match="their factors differ") as caught:
        load_deltas(adapter, open_checkpoint(base).architecture)
    assert caught.value.code == "twins_differ"


def test_two_adapters_cannot_train_the_same_token(tmp_path: Path, make_model: MakeModel) -> None:
    base = make_model()
    one, two, far = (
        save_adapted(base, lora(trainable_token_indices=rows), tmp_path / str(rows[0]), seed=rows[0])
        for rows in ([1, 5], [5, 9], [20, 21])
    )
    with pytest.raises(Mismatch, match="token 5 of") as caught:
        plan_merge(open_checkpoint(base), [(one, 1.0), (two, 1.0)])
    assert caught.value.code == "token_conflict"
    assert plan_merge(open_checkpoint(base), [(one, 1.0), (far, 1.0)]).touched


def test_two_dora_adapters_of_one_weight_are_refused(tmp_path: Path, make_model: MakeModel) -> None:
    base = make_model()
    one, two = (save_adapted(base, lora(use_dora=True), tmp_path / str(seed), seed=seed) for seed in (1, 2))
    with pytest.raises(Mismatch, match="rescale") as caught:
        plan_merge(open_checkpoint(base), [(one, 1.0), (two, 1.0)])
    assert caught.value.code == "two_rescale"
    assert "--sequential" in caught.value.next_step


def test_kasa_and_anything_else_on_one_weight_are_refused(tmp_path: Path, make_model: MakeModel) -> None:
    base, kasa = make_model(), {"kasa_config": KasaConfig()}
    dropping = save_adapted(base, lora(**kasa, target_modules=["q_proj"]), tmp_path / "kasa")
    plain, apart = (save_adapted(base, lora(target_modules=[name]), tmp_path / name) for name in ("q_proj", "v_proj"))
    with pytest.raises(Mismatch, match="kasa drops directions") as caught:
        plan_merge(open_checkpoint(base), [(plain, 1.0), (dropping, 1.0)])
    assert caught.value.code == "changed_base"
    assert plan_merge(open_checkpoint(base), [(dropping, 1.0), (apart, 1.0)]).touched


def test_dora_and_a_plain_lora_add_up_from_the_bases_own_weight(tmp_path: Path, make_model: MakeModel) -> None:
    base = make_model(shard="1GB")
    rescaling = save_adapted(base, lora(use_dora=True), tmp_path / "dora", seed=1)
    plain = save_adapted(base, lora(), tmp_path / "plain", seed=2)
    plan = plan_merge(open_checkpoint(base), [(plain, 0.5), (rescaling, 1.0)])
    run_merge(plan, tmp_path / "merged", device=DEVICE)
    W, scaled, moved = tensors_in(base), peft_merged(base, rescaling), peft_merged(base, plain)
    expected = {name: W[name] + (scaled[name] - W[name]) + 0.5 * (moved[name] - W[name]) for name in W}
    assert_all_close(tensors_in(tmp_path / "merged"), expected, 1e-6)


def without_flag(adapter: Path) -> None:
    change_config(adapter, use_dora=False)


def without_magnitude(adapter: Path) -> None:
    change_tensors(
        adapter, lambda tensors: {name: tensor for name, tensor in tensors.items() if "magnitude" not in name}
    )


@pytest.mark.parametrize("change", [without_flag, without_magnitude])
def test_a_magnitude_and_its_flag_must_agree(
    change: Callable[[Path], None], tmp_path: Path, make_model: MakeModel
) -> None:
    base = make_model()
    adapter = save_adapted(base, lora(use_dora=True), tmp_path / "adapter")
    change(adapter)
    with pytest.raises(Mismatch, match="magnitude, which goes with use_dora") as caught:
        load_deltas(adapter, open_checkpoint(base).architecture)
    assert "self_attn" in caught.value.subject


def test_tokens_that_no_tensor_has_are_an_error(tmp_path: Path, make_model: MakeModel) -> None:
    base = make_model()
    adapter = save_adapted(base, lora(trainable_token_indices=[1, 2]), tmp_path / "adapter")
    change_tensors(adapter, lambda tensors: {name: tensor for name, tensor in tensors.items() if "token" not in name})
    with pytest.raises(Mismatch, match="no tensor has their rows"):
        load_deltas(adapter, open_checkpoint(base).architecture)


def test_rows_that_do_not_fit_are_not_called_missing(tmp_path: Path, make_model: MakeModel) -> None:
    base = make_model()
    adapter = save_adapted(base, lora(trainable_token_indices=[1, 2]), tmp_path / "adapter")
    change_tensors(
        adapter, lambda tensors: {name: tensor[:1] if "token" in name else tensor for name, tensor in tensors.items()}
    )
    opened = read_adapter(adapter)
    placed = place(opened.config, opened.header, open_checkpoint(base).architecture)
    [wrong] = [finding.message for finding in placed.findings if finding.severity == "error"]
    assert "trained rows for 2 token ids up to 2; " in wrong


def test_a_bias_of_b_needs_a_bias_to_be_added_to(tmp_path: Path, make_model: MakeModel) -> None:
    base = make_model()
    with pytest.raises(Mismatch, match=r"q_proj\.bias is not a tensor of the base"):
        load_deltas(save_adapted(base, lora(lora_bias=True), tmp_path / "a"), open_checkpoint(base).architecture)


def test_a_convolution_in_groups_is_refused(tmp_path: Path) -> None:
    layers = nn.ModuleDict({"grouped": nn.Conv2d(4, 4, 3, groups=2)})
    get_peft_model(layers, lora(target_modules=["grouped"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(Mismatch, match="convolution in 2 groups"):
        load_deltas(tmp_path / "adapter", None)


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "aLoRA": ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens", "Store and serve it"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "pissa", "path_initial_model_for_weight_conversion"),
    "OLoRA": ({"init_lora_weights": "olora"}, "olora", "path_initial_model_for_weight_conversion"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_weight_can_express_is_refused_with_a_way_out(case: str, tmp_path: Path, make_model: MakeModel) -> None:
    settings, reason, way_out = REFUSED[case]
    base = make_model()
    adapter = save_adapted(base, lora(task_type="CAUSAL_LM", **settings), tmp_path / "adapter")
    with pytest.raises(NotSupported, match=reason) as caught:
        load_deltas(adapter, open_checkpoint(base).architecture)
    assert way_out in caught.value.next_step


def test_an_unknown_way_to_begin_is_not_said_to_have_changed_the_base(tmp_path: Path, make_model: MakeModel) -> None:
    base = make_model()
    adapter = save_adapted(base, lora(), tmp_path / "adapter")
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace('"init_lora_weights": true', '"init_lora_weights": "Wonder"'))
    with pytest.raises(NotSupported, match="init_lora_weights=wonder: this version does not know it"):
        load_deltas(adapter, open_checkpoint(base).architecture)


@pytest.mark.parametrize(
    "flag", ["use_qalora", "arrow_config", "layer_replication", "megatron_config", "alora_invocation_tokens"]
)
def test_a_flag_that_changes_more_than_weights_is_named(flag: str, tmp_path: Path, make_model: MakeModel) -> None:
    base = make_model()
    adapter = save_adapted(base, lora(), tmp_path / "adapter")
    config = adapter / "adapter_config.json"
    config.write_text(
        config.read_text().replace(f'"{flag}": null', f'"{flag}": 1').replace(f'"{flag}": false', f'"{flag}": true')
    )
    with pytest.raises(NotSupported, match=flag):
        load_deltas(adapter, open_checkpoint(base).architecture)


def test_a_converted_pissa_is_a_plain_lora(tmp_path: Path, make_model: MakeModel) -> None:
    base = make_model(shard="1GB")
    torch.manual_seed(5)
    model = get_peft_model(load_model(base), lora(init_lora_weights="pissa"))
    start = tmp_path / "start"
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(start)
    model.peft_config["default"].init_lora_weights = "pissa"
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    with torch.no_grad():
        expected = model.eval()(IDS).logits
    model.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(start))
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    assert relative(logits(tmp_path / "merged"), expected) <= 1e-5
    assert isinstance(PeftModel.from_pretrained(load_model(base), tmp_path / "adapter"), PeftModel)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_for_what_its_start_left_of_the_base_it_is_a_plain_lora(
    init: str, tmp_path: Path, make_model: MakeModel
) -> None:
    base = make_model(shard="1GB")
    torch.manual_seed(5)
    model = get_peft_model(load_model(base), lora(task_type="CAUSAL_LM", init_lora_weights=init))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    with torch.no_grad():
        expected = model.eval()(IDS).logits
    model.save_pretrained(tmp_path / "adapter")
    model.unload().save_pretrained(tmp_path / "rest")
    architecture = open_checkpoint(tmp_path / "rest").architecture
    report = convert_rebased(tmp_path / "adapter", tmp_path / "plain", architecture)
    assert (report.layout, report.rank_max) == (init, 4)
    merge(tmp_path / "rest", tmp_path / "plain", tmp_path / "merged")
    assert relative(logits(tmp_path / "merged"), expected) <= 1e-5
    assert relative(peft_logits(tmp_path / "rest", tmp_path / "plain"), expected) <= 1e-5
    with pytest.raises(NotSupported) as again:
        convert_rebased(tmp_path / "plain", tmp_path / "twice", architecture)
    assert again.value.code == "not_rebased"
    assert not (tmp_path / "twice").exists()


@pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e5m2])
@pytest.mark.parametrize("part", ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector"])
def test_factors_that_are_no_plain_floating_point_are_refused(
    part: str, dtype: torch.dtype, tmp_path: Path, make_model: MakeModel
) -> None:
    base = make_model()
    adapter = save_adapted(base, lora(use_dora=True), tmp_path / "adapter")
    key = f"base_model.model.model.layers.1.self_attn.v_proj.{part}"
    change_tensors(adapter, lambda tensors: {**tensors, key: tensors[key].to(dtype)})
    with pytest.raises(Mismatch, match=rf"{part} is stored as (I32|F8_E5M2), .*save the adapter in") as caught:
        load_deltas(adapter, open_checkpoint(base).architecture)
    assert (caught.value.code, caught.value.subject) == ("bad_dtype", "model.layers.1.self_attn.v_proj")
