"""Every adapter type other than LoRA: merged as PEFT merges it, and refused by name where no exact merge exists."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from composer.deltas.delta import Replacement, RowwiseDelta
from composer.deltas.variants import rescaled
from composer.deltas.variants.load import READERS, load_deltas
from composer.errors import ComposerError, InvalidFile, Mismatch, NotSupported
from composer.formats.adapters.config.types import TYPES
from composer.formats.adapters.facts import read_adapter
from composer.formats.adapters.inspection import inspect
from composer.formats.checkpoints.checkpoint import open_checkpoint
from composer.merge.plan import plan_merge
from composer.merge.run import run_merge
from tests.composer.adapted import (
    assert_all_close,
    assert_merged_like_peft,
    assert_rows_follow_the_device,
    change_config,
    change_tensors,
    changed_by,
    merge,
    peft_merged,
    save_adapted,
    save_adapted_layers,
)
from tests.composer.tiny import MakeModel, build_config, tensors_in
from tests.doses import each_value_once, one_of_each

BOTH: dict[str, Any] = {"target_modules": ["q_proj", "k_proj", "down_proj", "up_proj"]}
GPT2: dict[str, Any] = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}

LLAMA_CASES: dict[str, peft.PeftConfig] = {
    "AdaLoRA": peft.AdaLoraConfig(init_r=6, target_r=4, total_step=10, lora_alpha=8, **BOTH),
    "AdaLoRA without alpha": peft.AdaLoraConfig(init_r=3, target_r=2, total_step=10, lora_alpha=0, **BOTH),
    "LoHa": peft.LoHaConfig(r=4, alpha=3, **BOTH),
    "LoHa with patterns": peft.LoHaConfig(r=4, rank_pattern={"up_proj": 2}, alpha_pattern={"q_proj": 3}, **BOTH),
    "LoKr": peft.LoKrConfig(r=2, **BOTH),
    "LoKr of small factors": peft.LoKrConfig(r=1, decompose_both=True, decompose_factor=4, **BOTH),
    "LoKr whole": peft.LoKrConfig(r=64, **BOTH),
    "(IA)3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "GLoRA": peft.GloraConfig(r=4, **BOTH),
    "GLoRA of one vector for each output": peft.GloraConfig(config_A_B="vector", **BOTH),
    "GLoRA that is off": peft.GloraConfig(config_A_B="none", **BOTH),
    "LN tuning": peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]),
    "VeRA": peft.VeraConfig(r=4, **BOTH),
    "PVeRA": peft.PveraConfig(r=4, **BOTH),
    "RandLoRA": peft.RandLoraConfig(r=4, randlora_alpha=2, **BOTH),
    "VB-LoRA": peft.VBLoRAConfig(r=4, vector_length=4, num_vectors=16, topk=2, **BOTH),
    "VB-LoRA, top k": peft.VBLoRAConfig(
        r=4, vector_length=4, num_vectors=16, topk=3, save_only_topk_weights=True, **BOTH
    ),
    "Uni-LoRA": peft.UniLoraConfig(r=4, theta_d_length=64, save_indices=True, **BOTH),
    "GraLoRA": peft.GraloraConfig(r=4, alpha=6, gralora_k=2, **BOTH),
    "GraLoRA, hybrid": peft.GraloraConfig(r=4, alpha=6, gralora_k=2, hybrid_r=3, **BOTH),
    "DeLoRA": peft.DeloraConfig(r=4, **BOTH),
    "HiRA": peft.HiraConfig(r=4, **BOTH),
    "(IA)3 with a flag for another model": peft.IA3Config(
        target_modules=["k_proj"], feedforward_modules=[], fan_in_fan_out=True
    ),
    "HiRA on the embedding": peft.HiraConfig(r=4, target_modules=["embed_tokens", "v_proj"]),
    "MiSS": peft.MissConfig(r=4, **BOTH),
    "MiSS with a remainder": peft.MissConfig(r=5, **BOTH),
    "MiSS, mini": peft.MissConfig(r=4, init_weights="mini", mini_r=8, **BOTH),
    "MiSS, bat": peft.MissConfig(r=4, init_weights="bat", **BOTH),
    "C3A": peft.C3AConfig(block_size=8, **BOTH),
    "FourierFT": peft.FourierFTConfig(n_frequency=20, scaling=15.0, random_loc_seed=3, **BOTH),
    "OFT": peft.OFTConfig(oft_block_size=4, **BOTH),
    "OFT, three terms": peft.OFTConfig(oft_block_size=4, num_cayley_neumann_terms=3, **BOTH),
    "OFT, seven terms": peft.OFTConfig(oft_block_size=4, num_cayley_neumann_terms=7, **BOTH),
    "OFT, exact": peft.OFTConfig(oft_block_size=4, use_cayley_neumann=False, **BOTH),
    "OFT, one block for all": peft.OFTConfig(oft_block_size=8, block_share=True, **BOTH),
    "OFT, constrained": peft.OFTConfig(oft_block_size=8, coft=True, eps=0.1, **BOTH),
    "BOFT": peft.BOFTConfig(boft_block_size=4, **BOTH),
    "HRA": peft.HRAConfig(r=4, **BOTH),
    "HRA, orthogonal": peft.HRAConfig(r=4, apply_GS=True, **BOTH),
    "RoAd 1": peft.RoadConfig(group_size=4, **BOTH),
    "RoAd 2": peft.RoadConfig(group_size=8, variant="road_2", **BOTH),
    "RoAd 4": peft.RoadConfig(group_size=4, variant="road_4", **BOTH),
    "FourierFT, another number for one module": peft.FourierFTConfig(
        n_frequency=20, n_frequency_pattern={"layers.1.self_attn.q_proj": 30}, **BOTH
    ),
    "Super-Tuning": peft.SupertuningConfig(sparsity=0.9, **BOTH),
    "Super-Tuning with a pair": peft.SupertuningConfig(sparsity=0.8, select_top=False, r=3, lora_alpha=5, **BOTH),
    "SHiRA": peft.ShiraConfig(r=2, **BOTH),
    "DEFT": peft.DeftConfig(r=3, **BOTH),
    "DEFT, orthogonal": peft.DeftConfig(r=3, decomposition_method="qr", alpha=6, **BOTH),
    "DEFT, PaRa": peft.DeftConfig(r=3, para=True, decomposition_method="qr", **BOTH),
    "trained tokens": peft.TrainableTokensConfig(token_indices=[7, 2, 30], target_modules=["embed_tokens"]),
}
ONE_OF_EACH_TYPE = one_of_each(LLAMA_CASES, lambda case: LLAMA_CASES[case].peft_type)
GPT2_CASES: dict[str, peft.PeftConfig] = {
    "AdaLoRA": peft.AdaLoraConfig(init_r=6, target_r=4, total_step=10, **GPT2),
    "(IA)3": peft.IA3Config(
        target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True
    ),
    "VeRA": peft.VeraConfig(r=4, **GPT2),
    "VB-LoRA": peft.VBLoRAConfig(r=4, vector_length=4, num_vectors=16, topk=2, **GPT2),
    "HiRA": peft.HiraConfig(r=4, **GPT2),
    "FourierFT": peft.FourierFTConfig(n_frequency=20, **GPT2),
    "DEFT": peft.DeftConfig(r=3, **GPT2),
    "LoRA with all biases, one of them saved twice": peft.LoraConfig(r=4, bias="all", modules_to_save=["ln_1"], **GPT2),
}


def test_every_type_that_is_read_has_a_case_and_a_function() -> None:
    assert {config.peft_type.value for config in (*LLAMA_CASES.values(), *BIASED.values())} - {"LORA"} == set(TYPES)
    assert set(READERS) == set(TYPES) - {"TRAINABLE_TOKENS", "LN_TUNING"}  # rows and replacements, as in a LoRA


def test_a_reader_that_makes_two_deltas_of_one_weight_is_an_error(
    tmp_path: Path, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_model()
    adapter = save_adapted(base, LLAMA_CASES["HiRA"], tmp_path / "adapter")
    monkeypatch.setitem(READERS, "HIRA", lambda module: 2 * rescaled.hira(module))
    with pytest.raises(RuntimeError, match="makes 2 deltas"):
        merge(base, adapter, tmp_path / "merged")


@pytest.mark.parametrize("case", LLAMA_CASES)
def test_a_merge_into_llama_equals_pefts_own(case: str, tmp_path: Path, make_model: MakeModel) -> None:
    base = make_model(shard="1GB")
    adapter = save_adapted(base, LLAMA_CASES[case], tmp_path / "adapter")
    assert_merged_like_peft(base, adapter, tmp_path / "merged")


@pytest.mark.parametrize("case", GPT2_CASES)
def test_a_merge_into_gpt2_equals_pefts_own(case: str, tmp_path: Path, make_model: MakeModel) -> None:
    base = make_model("gpt2", shard="1GB")
    adapter = save_adapted(base, GPT2_CASES[case], tmp_path / "adapter")
    assert_merged_like_peft(base, adapter, tmp_path / "merged")


BIASED: dict[str, peft.PeftConfig] = {
    "GLoRA with constants": peft.GloraConfig(target_modules=["q_proj"], config_A_B="constant", config_C="none"),
    "GLoRA with vectors": peft.GloraConfig(
        target_modules=["q_proj", "v_proj"], config_A_B="vector", config_C="none", config_D_E="vector"
    ),
    "LN tuning of a biased model": peft.LNTuningConfig(target_modules=["input_layernorm", "v_proj"]),
    "(IA)3": peft.IA3Config(target_modules=["q_proj", "v_proj", "o_proj"], feedforward_modules=["o_proj"]),
    "RoAd": peft.RoadConfig(group_size=4, target_modules=["q_proj", "v_proj"]),
    "BEFT": peft.BeftConfig(target_modules=["q_proj", "v_proj"]),
    "VeRA with its biases": peft.VeraConfig(r=4, target_modules=["q_proj"], bias="vera_only"),
    "HRA with all biases": peft.HRAConfig(r=4, target_modules=["q_proj"], bias="all"),
    "LoHa with a saved head": peft.LoHaConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("case", BIASED)
def test_biases_and_whole_modules_come_along(case: str, tmp_path: Path) -> None:
    config = build_config("llama", tied=False)
    config.attention_bias = True
    base = tmp_path / "base"
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    model.save_pretrained(base)
    adapter = save_adapted(base, BIASED[case], tmp_path / "adapter")
    assert_merged_like_peft(base, adapter, tmp_path / "merged")


def test_glora_whose_bias_gets_a_product_with_the_weight_is_refused_by_name(tmp_path: Path) -> None:
    config = build_config("llama", tied=False)
    config.attention_bias = True
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    adapter = save_adapted(tmp_path / "base", peft.GloraConfig(target_modules=["q_proj"]), tmp_path / "adapter")
    with pytest.raises(Mismatch, match=r"q_proj has a bias, to which glora_C\.Xd adds a product") as caught:
        merge(tmp_path / "base", adapter, tmp_path / "merged")
    assert caught.value.code == "unsupported_layer"


def test_two_gloras_of_one_weight_add_up_as_in_peft(tmp_path: Path, make_model: MakeModel) -> None:
    base = make_model(shard="1GB")
    kinds = {"one": peft.GloraConfig(r=4, **BOTH), "two": peft.GloraConfig(r=2, config_A_B="vector", **BOTH)}
    adapters = [save_adapted(base, config, tmp_path / name) for name, config in kinds.items()]
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapters[0], "one")
    model.load_adapter(adapters[1], "two")
    expected = model.base_model.merge_and_unload(adapter_names=["one", "two"]).state_dict()
    plan = plan_merge(open_checkpoint(base), [(adapter, 1.0) for adapter in adapters])
    run_merge(plan, tmp_path / "merged", device="cpu")
    merged = tensors_in(tmp_path / "merged")
    assert_all_close(merged, {name: expected[name] for name in merged}, 1e-6)


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(8, 6, (3, 2))
        self.point = nn.Conv2d(8, 6, 1)
        self.line = nn.Conv1d(8, 6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.wide(x)


@pytest.mark.parametrize("rank", [1, 64])
@pytest.mark.parametrize("effective", [True, False])
@pytest.mark.parametrize("kind", [peft.LoHaConfig, peft.LoKrConfig])
def test_convolutions_change_as_in_peft(
    kind: type[peft.PeftConfig], effective: bool, rank: int, tmp_path: Path
) -> None:
    torch.manual_seed(2)
    model = Convolution()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings: Any = {"r": rank, "alpha": 2, "target_modules": ["wide", "point"], "use_effective_conv2d": effective}
    if (kind, effective, rank) != (peft.LoKrConfig, True, 1):  # PEFT makes a tensor from it that it cannot use
        settings["target_modules"].append("line")
    merged = save_adapted_layers(model, kind(**settings), tmp_path / "adapter")
    changed = changed_by(Convolution(), before, tmp_path / "adapter")
    assert not torch.equal(changed["wide.weight"], before["wide.weight"])
    assert_all_close(changed, merged, 1e-6)


def test_a_module_that_adalora_left_no_rank_adds_nothing(tmp_path: Path, make_model: MakeModel) -> None:
    base = make_model()
    adapter = save_adapted(base, LLAMA_CASES["AdaLoRA"], tmp_path / "adapter")
    gone = "model.layers.1.self_attn.k_proj"

    def cut(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        own = {name: tensor for name, tensor in tensors.items() if gone in name}
        empty = {name: tensor[:, :0] if "lora_B" in name else tensor[:0] for name, tensor in own.items()}
        return tensors | {name: tensor.contiguous() for name, tensor in empty.items()}

    change_tensors(adapter, cut)
    touched = merge(base, adapter, tmp_path / "merged").touched
    assert "model.layers.0.self_attn.k_proj.weight" in touched
    assert f"{gone}.weight" not in touched


UNSAVED: dict[str, tuple[peft.PeftConfig, str]] = {
    "VeRA": (peft.VeraConfig(r=4, save_projection=False, **BOTH), "save_projection"),
    "PVeRA": (peft.PveraConfig(r=4, save_projection=False, **BOTH), "save_projection"),
    "RandLoRA": (peft.RandLoraConfig(r=4, save_projection=False, **BOTH), "save_projection"),
    "Uni-LoRA": (peft.UniLoraConfig(r=4, theta_d_length=64, **BOTH), "save_indices"),
    "Super-Tuning": (peft.SupertuningConfig(save_precomputed_indices=False, **BOTH), "save_precomputed_indices"),
}


@pytest.mark.parametrize("case", UNSAVED)
def test_what_another_machine_would_draw_differently_is_refused(
    case: str, tmp_path: Path, make_model: MakeModel
) -> None:
    config, option = UNSAVED[case]
    base = make_model()
    adapter = save_adapted(base, config, tmp_path / "adapter")
    with pytest.raises(NotSupported, match=option) as caught:
        load_deltas(adapter, open_checkpoint(base).architecture)
    assert f"{option}=True" in caught.value.next_step


def test_shira_without_its_indices_is_refused_with_that_reason(tmp_path: Path, make_model: MakeModel) -> None:
    base = make_model()
    adapter = save_adapted(base, LLAMA_CASES["SHiRA"], tmp_path / "adapter")
    change_tensors(adapter, lambda all_: {key: one for key, one in all_.items() if "indices" not in key})
    with pytest.raises(Mismatch, match="no shira_indices: the places of its values were not saved") as caught:
        load_deltas(adapter, open_checkpoint(base).architecture)
    assert caught.value.code == "missing_part"
    assert "save_pretrained" in caught.value.next_step


def test_indices_that_peft_saved_as_floats_on_windows_are_read_and_others_refused(
    tmp_path: Path, make_model: MakeModel
) -> None:
    base = make_model()
    adapter = save_adapted(base, LLAMA_CASES["SHiRA"], tmp_path / "adapter")
    expected = peft_merged(base, adapter)

    change_tensors(adapter, lambda all_: {key: one.float() for key, one in all_.items()})
    merge(base, adapter, tmp_path / "merged")
    assert_all_close(tensors_in(tmp_path / "merged"), expected, 1e-6)
    change_tensors(adapter, lambda all_: {key: one + 0.5 if "ind" in key else one for key, one in all_.items()})
    with pytest.raises(InvalidFile, match="whole numbers") as caught:
        merge(base, adapter, tmp_path / "wrong")
    assert caught.value.code == "bad_index"


@pytest.mark.parametrize(
    ("case", "field", "value", "code"),
    [
        ("OFT", "use_dora", True, "unknown_config"),
        ("OFT", "coft", "yes", "bad_config"),
        ("OFT", "num_cayley_neumann_terms", -1, "bad_config"),
        ("LoHa", "alpha", "8", "bad_config"),
        ("LoHa", "r", 0, "bad_config"),
        ("RoAd 1", "variant", "road_3", "bad_config"),
        ("MiSS", "init_weights", "new", "bad_config"),
        ("VeRA", "bias", "lora_only", "bad_config"),
        ("trained tokens", "token_indices", [1, 1], "bad_config"),
        ("trained tokens", "token_indices", [-1], "bad_config"),
    ],
)
def test_a_setting_that_is_unknown_or_of_another_kind_is_named(
    case: str, field: str, value: object, code: str, tmp_path: Path, make_model: MakeModel
) -> None:
    adapter = save_adapted(make_model(), LLAMA_CASES[case], tmp_path / "adapter")
    change_config(adapter, **{field: value})
    with pytest.raises((InvalidFile, NotSupported), match=field) as caught:
        read_adapter(adapter)
    assert caught.value.code == code


# Defects of a tensor: each changes its shape, or moves its numbers out of range.
HARMS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cut": lambda tensor: tensor[: max(1, len(tensor) - 1)],
    "none of it": lambda tensor: tensor[:0],
    "transposed": lambda tensor: tensor.mT if tensor.dim() > 1 else tensor[None],
    "flat": lambda tensor: tensor.flatten(),
    "one dimension more": lambda tensor: tensor[..., None],
    "twice as wide": lambda tensor: torch.cat([tensor, tensor], dim=-1),
    "large numbers": lambda tensor: tensor + 90 if not tensor.is_floating_point() else tensor * 1e3,
}


@pytest.mark.parametrize("case", ONE_OF_EACH_TYPE)
def test_a_damaged_part_is_an_error_and_never_another_delta(case: str, tmp_path: Path, make_model: MakeModel) -> None:
    """For any damage to one tensor: one of the composer's errors, or deltas of the base's shape."""
    base = make_model(shard="1GB")
    architecture, W = open_checkpoint(base).architecture, tensors_in(base)
    adapter = save_adapted(base, LLAMA_CASES[case], tmp_path / "adapter")
    sound = load_file(adapter / "adapter_model.safetensors")
    kinds = {name.rpartition("proj.")[2]: name for name in sound}
    refused: list[ComposerError] = []
    for name in kinds.values():
        for harm in HARMS.values():
            save_file(sound | {name: harm(sound[name]).contiguous()}, adapter / "adapter_model.safetensors")
            try:
                deltas = list(load_deltas(adapter, architecture).deltas)
            except ComposerError as error:
                refused.append(error)
                continue
            for delta in deltas:
                if isinstance(delta, Replacement):
                    assert delta.tensor.shape == W[delta.weight].shape
                    continue
                W_MN = W[delta.weight].reshape(delta.stored_shape)
                added = (
                    delta.rows(W_MN, 0) if isinstance(delta, RowwiseDelta) else torch.matmul(*delta.stored_factors())
                )
                assert added.shape == W_MN.shape
    assert len(refused) >= 3 * len(kinds)
    assert all(error.subject for error in refused)


def test_a_part_that_is_missing_is_named(tmp_path: Path, make_model: MakeModel) -> None:
    base = make_model()
    adapter = save_adapted(base, LLAMA_CASES["LoHa"], tmp_path / "adapter")
    change_tensors(
        adapter, lambda tensors: {n: t for n, t in tensors.items() if not n.endswith("0.self_attn.q_proj.hada_w2_b")}
    )
    with pytest.raises(Mismatch, match="no hada_w2_b") as caught:
        load_deltas(adapter, open_checkpoint(base).architecture)
    assert caught.value.code == "missing_part"
    assert caught.value.subject == "model.layers.0.self_attn.q_proj"


def test_boft_of_several_factors_is_refused(tmp_path: Path, make_model: MakeModel) -> None:
    base = make_model()
    adapter = save_adapted(base, LLAMA_CASES["BOFT"], tmp_path / "adapter")
    change_tensors(adapter, lambda ts: {n: t.repeat(2, 1, 1, 1) if "boft_R" in n else t for n, t in ts.items()})
    with pytest.raises(Mismatch, match=r"2 butterfly factors.*boft_n_butterfly_factor=1"):
        load_deltas(adapter, open_checkpoint(base).architecture)


def test_rotations_of_an_old_peft_are_refused_with_the_way_out(tmp_path: Path, make_model: MakeModel) -> None:
    base = make_model()
    adapter = save_adapted(base, LLAMA_CASES["OFT"], tmp_path / "adapter")
    change_tensors(adapter, lambda ts: {n.replace("oft_R.weight", "oft_r"): torch.zeros(4, 4, 4) for n in ts})
    for architecture in (None, open_checkpoint(base).architecture):
        with pytest.raises(NotSupported, match=r"oft_r .* up to 0\.15\.2") as caught:
            load_deltas(adapter, architecture)
        assert caught.value.next_step == "Merge it into its base with PEFT 0.15.2, or train it anew."


def test_an_adapter_of_another_base_is_an_error_that_names_the_module(tmp_path: Path, make_model: MakeModel) -> None:
    gpt2, llama = make_model("gpt2", name="gpt2"), make_model()
    for case in ("HRA", "C3A", "VeRA"):
        adapter = save_adapted(llama, LLAMA_CASES[case], tmp_path / case)
        with pytest.raises(Mismatch, match="No tensor matches the base"):
            load_deltas(adapter, open_checkpoint(gpt2).architecture)


@pytest.mark.parametrize(("case", "dtype"), each_value_once(LLAMA_CASES, [torch.float32, torch.float64]))
def test_rows_are_the_same_in_any_cut_and_computed_where_the_weight_is(
    case: str, dtype: torch.dtype, accelerator: str, tmp_path: Path, make_model: MakeModel
) -> None:
    base = make_model(shard="1GB")
    W = tensors_in(base)
    adapter = save_adapted(base, LLAMA_CASES[case], tmp_path / "adapter")
    for delta in load_deltas(adapter, open_checkpoint(base).architecture).deltas:
        if isinstance(delta, RowwiseDelta):
            W_MN = W[delta.weight].reshape(delta.stored_shape).to(dtype)
            before = W_MN.clone()
            full = delta.rows(W_MN, 0)
            assert full.dtype is dtype
            assert torch.equal(W_MN, before)
            cuts = [0, len(W_MN)] if delta.all_rows else [0, 1, 6, 11, len(W_MN)]
            parts = [delta.rows(W_MN[begin:end], begin) for begin, end in itertools.pairwise(cuts)]
            # A small Δ is the difference of two weights, and includes their rounding.
            assert_all_close({case: torch.cat(parts)}, {case: full}, 1e-5 if dtype is torch.float32 else 1e-13)
            assert_rows_follow_the_device(delta, accelerator)


@pytest.mark.parametrize("case", ["OFT", "LoHa", "VeRA", "FourierFT", "RoAd 1", "HiRA on the embedding"])
def test_a_bf16_merge_rounds_once(case: str, tmp_path: Path, make_model: MakeModel) -> None:
    exact, base = make_model(shard="1GB", name="exact"), make_model(dtype=torch.bfloat16)
    rounded = {name: tensor.float() for name, tensor in tensors_in(base).items()}
    save_file(rounded, exact / "model.safetensors", {"format": "pt"})
    adapter = save_adapted(exact, LLAMA_CASES[case], tmp_path / "adapter")
    touched = merge(base, adapter, tmp_path / "merged").touched
    expected, merged = peft_merged(exact, adapter), tensors_in(tmp_path / "merged")
    for name in touched:
        error = (merged[name].double() - expected[name].double()).abs()
        assert bool((error <= expected[name].double().abs() * 2**-8 * 1.001 + 1e-6).all()), name


MODULES = {
    "(IA)3": 6,
    "(IA)3 with a flag for another model": 3,
    "HiRA on the embedding": 4,
    "LN tuning": 4,
    "trained tokens": 1,
}


@pytest.mark.parametrize("case", ONE_OF_EACH_TYPE)
def test_facts_and_servers_say_what_it_is(case: str, tmp_path: Path, make_model: MakeModel) -> None:
    base = make_model()
    adapter = save_adapted(base, LLAMA_CASES[case], tmp_path / "adapter")
    for architecture in (None, open_checkpoint(base).architecture):
        seen = inspect(adapter, architecture)
        assert seen.findings == []
        assert seen.facts.type == LLAMA_CASES[case].peft_type.value.lower()
        assert seen.facts.variant == seen.facts.type
        assert seen.facts.modules == MODULES.get(case, 12)
        assert json.loads(json.dumps(seen.facts.to_json()))["targets"] == list(seen.facts.targets)
    assert seen.loads_in("peft").loads
    for server in ("vllm:64", "sglang", "lorax", "llamacpp"):
        loading = seen.loads_in(server)
        assert not loading.loads
        assert any("only LoRA" in reason for reason in loading.reasons)
        assert any("merge" in way for way in loading.way_out)


@pytest.mark.parametrize(
    ("settings", "rank", "alpha"),
    [({"r": 3, "lora_alpha": 5}, 3, 5.0), ({"r": 3}, 3, 6.0), ({}, 0, 0.0)],
)
def test_the_rank_of_super_tuning_is_that_of_the_pair_beside_its_values(
    settings: dict[str, int], rank: int, alpha: float, tmp_path: Path, make_model: MakeModel
) -> None:
    config = peft.SupertuningConfig(sparsity=0.8, **settings, **BOTH)
    seen = inspect(save_adapted(make_model(), config, tmp_path / "adapter"), None)
    assert (seen.facts.rank_max, seen.facts.alpha) == (rank, alpha)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float8_e4m3fn])
@pytest.mark.parametrize(("case", "part"), [("LoHa", "hada_w1_a"), ("VeRA", "vera_A"), ("trained tokens", "tokens")])
def test_numbers_that_are_no_plain_floating_point_are_refused(
    case: str, part: str, dtype: torch.dtype, tmp_path: Path, make_model: MakeModel
) -> None:
    base = make_model()
    adapter = save_adapted(base, LLAMA_CASES[case], tmp_path / "adapter")
    change_tensors(adapter, lambda tensors: {n: t.to(dtype) if part in n else t for n, t in tensors.items()})
    with pytest.raises(Mismatch, match=rf"{part}.* is stored as (I8|I64|F8_E4M3), .*save the adapter in") as caught:
        load_deltas(adapter, open_checkpoint(base).architecture)
    assert caught.value.code == "bad_dtype"
    assert caught.value.subject.startswith("model.")


@pytest.mark.parametrize("fields", [{"n_frequency": 21}, {"n_frequency_pattern": {"layers.0.mlp.up_proj": 5}}])
def test_another_number_of_coefficients_than_the_config_says_is_refused(
    fields: dict[str, object], tmp_path: Path, make_model: MakeModel
) -> None:
    """PEFT would not load them: it draws as many positions as the config states."""
    base = make_model()
    adapter = save_adapted(base, LLAMA_CASES["FourierFT"], tmp_path / "adapter")
    change_config(adapter, **fields)
    with pytest.raises(Mismatch, match=r"20 coefficients, where the config's n_frequency is (21|5)") as caught:
        load_deltas(adapter, open_checkpoint(base).architecture)
    assert caught.value.code == "shape_mismatch"
