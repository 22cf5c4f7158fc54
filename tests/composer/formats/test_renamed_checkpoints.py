"""Models that transformers loads under other names than their checkpoints have: adapters name modules in memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, ViTConfig, ViTForImageClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from composer.deltas.variants.load import load_deltas
from composer.errors import Mismatch
from composer.evaluation.hooks import deltas_applied
from composer.formats.adapters.placement.naming import Target, find_weight
from composer.formats.checkpoints.checkpoint import Architecture, open_checkpoint
from composer.formats.checkpoints.header import TensorSpec
from composer.formats.checkpoints.tying import NEVER_TIED
from tests.composer.adapted import (
    IDS,
    assert_all_close,
    assert_merged_like_peft,
    merge,
    peft_logits,
    relative,
    save_adapted,
)
from tests.composer.adapted import logits as logits_of
from tests.composer.handmade import random_factors, write_adapter
from tests.composer.tiny import load_model, tensors_in
from tests.doses import further

SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 32, "tie_word_embeddings": False, "head_dim": 8,
    "pad_token_id": 0,
}  # fmt: skip
MOE: dict[str, Any] = {
    "moe_intermediate_size": 12, "n_routed_experts": 4, "num_experts": 4, "num_experts_per_tok": 2,
    "n_shared_experts": 1, "num_shared_experts": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
LOCAL: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT: dict[str, Any] = {
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    "index_n_heads": 2, "index_head_dim": 8, "index_topk": 4,
}  # fmt: skip
NEMOTRON: dict[str, Any] = {
    **MOE, "num_hidden_layers": 3, "layers_block_type": ["attention", "mlp", "moe"], "moe_latent_size": None,
    "moe_shared_expert_intermediate_size": 20,
}  # fmt: skip
HYBRID: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention"], "first_k_dense_replace": 1}
DEEPSEEK: dict[str, Any] = {
    **MOE, **LATENT, "num_key_value_heads": 1, "o_groups": 2, "o_lora_rank": 4, "mlp_layer_types": ["moe", "hash_moe"],
    "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"],
}  # fmt: skip
MAMBA: dict[str, Any] = {"layer_types": ["attention"] * 2, "mamba_n_heads": 8, "mamba_d_head": 8}
GRANITE = ["block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"]
FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

# model type, its own config fields, modules, parameters
CASES: dict[str, tuple[str, dict[str, Any], list[str], list[str]]] = {
    "Nemotron-H": ("nemotron_h", NEMOTRON, ["q_proj", "o_proj", "up_proj"], []),
    "Nemotron-H, experts": ("nemotron_h", NEMOTRON, ["v_proj"], ["mixer.experts.up_proj", "mixer.experts.down_proj"]),
    "Nemotron-H, router": ("nemotron_h", NEMOTRON, ["v_proj"], ["mixer.gate.weight"]),
    "Granite MoE": ("granitemoe", LOCAL, ["q_proj"], GRANITE),
    "Granite MoE, down alone": ("granitemoe", LOCAL, ["q_proj"], GRANITE[1:]),
    "Granite MoE, router": ("granitemoe", LOCAL, ["q_proj"], ["block_sparse_moe.router.weight"]),
    "Granite MoE, shared": ("granitemoeshared", {**LOCAL, "shared_intermediate_size": 20}, ["input_linear"], GRANITE),
    "Granite MoE, hybrid": (
        "granitemoehybrid", {**LOCAL, **MAMBA, "shared_intermediate_size": 20}, ["output_linear"], GRANITE,
    ),
    "Phi-MoE, router": ("phimoe", LOCAL, ["q_proj"], ["mlp.router.weight"]),
    "Phi-MoE, experts": ("phimoe", LOCAL, ["q_proj"], FUSED),
    "Aria, square and stored inputs first": (
        "aria_text", {"moe_num_experts": 4, "moe_topk": 2, "intermediate_size": 32}, ["q_proj"], FUSED,
    ),
    "EXAONE": ("exaone", {}, ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], []),
    "A.X-K2": ("axk2", {**MOE, **LATENT}, ["fc1", "fc2", "q_gate_proj"], FUSED),
    "Bailing": ("bailing_hybrid", {**MOE, **LATENT, **HYBRID}, ["f_proj", "o_proj", "q_a_proj"], FUSED),
    "DeepSeek-V4": (
        "deepseek_v4", DEEPSEEK, ["q_a_proj", "q_b_proj", "kv_proj", "gate_proj", "o_b_proj", "weights_proj"], FUSED,
    ),
    "Hunyuan V3": ("hy_v3", MOE, ["up_proj"], ["mlp.gate.weight", *FUSED]),
    "Hunyuan V4": ("hy_v4", {**MOE, **LATENT}, ["gate_proj"], ["attn_hc.fn", "model.hc_head.hc_fn"]),
    "Kimi Linear": ("kimi_linear", {**MOE, **LATENT, **HYBRID}, ["f_a_proj", "up_proj"], FUSED),
    "LFM3": ("lfm3", {"layer_types": ["conv", "full_attention"]}, ["g_proj"], []),
    "Sarvam, what is not cut": ("sarvam_moe", MOE, ["o_proj", "embed_tokens"], FUSED),
    "Inkling, three stacks on one module": (
        "inkling_text", {**MOE, "layer_types": ["hybrid_sliding", "hybrid"]}, ["q_proj"],
        [f"mlp.shared_experts.{name}" for name in ("down_proj", "up_proj", "gate_proj")],
    ),
}  # fmt: skip


def save_base(model_type: str, own: dict[str, Any], directory: Path) -> Path:
    torch.manual_seed(11)
    config = AutoConfig.for_model(model_type, **{**SMALL, **own})
    return save(AutoModelForCausalLM.from_config(config), directory)


def save(model: PreTrainedModel, directory: Path) -> Path:
    """Saves with random numbers: some parameters start as zeros, or as uninitialized memory."""
    with torch.no_grad():
        for parameter in model.float().parameters():
            parameter.normal_(std=0.2)
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("case", CASES)
def test_a_merge_into_a_checkpoint_of_other_names_equals_pefts_own(case: str, tmp_path: Path) -> None:
    model_type, own, modules, parameters = CASES[case]
    base = save_base(model_type, own, tmp_path / "base")
    config = LoraConfig(r=2, lora_alpha=3, target_modules=modules, target_parameters=parameters or None)
    adapter = save_adapted(base, config, tmp_path / "adapter")
    assert_merged_like_peft(base, adapter, tmp_path / "merged")
    assert tensors_in(base).keys() == tensors_in(tmp_path / "merged").keys()


def test_an_embedding_under_another_name_is_untied_where_it_is_tied(tmp_path: Path) -> None:
    base = save_base("nemotron_h", {**NEMOTRON, "tie_word_embeddings": True}, tmp_path / "base")
    assert "backbone.embeddings.weight" in tensors_in(base)
    adapter = save_adapted(base, LoraConfig(r=2, target_modules=["embeddings", "q_proj"]), tmp_path / "adapter")
    merge(base, adapter, tmp_path / "merged")
    assert relative(logits_of(tmp_path / "merged"), peft_logits(base, adapter)) <= 1e-5


@pytest.mark.parametrize("case", ["Nemotron-H", "Bailing", *further("Kimi Linear")])
def test_trained_tokens_leave_the_head_alone_where_the_models_class_ties_nothing(case: str, tmp_path: Path) -> None:
    model_type, own, *_ = CASES[case]
    base = save_base(model_type, {**own, "tie_word_embeddings": True}, tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["o_proj"], trainable_token_indices=[3, 5])
    assert_merged_like_peft(base, save_adapted(base, config, tmp_path / "adapter"), tmp_path / "merged")


@pytest.mark.long
def test_the_models_that_tie_nothing_are_those_of_transformers() -> None:
    classes = {name: getattr(transformers, made) for name, made in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()}
    assert {name for name, made in classes.items() if getattr(made, "_tied_weights_keys", None) == {}} == NEVER_TIED


@pytest.mark.parametrize(
    "trained", [{"trainable_token_indices": [3]}, {"target_modules": ["embed_tokens", "q_proj"]}], ids=str
)
def test_an_embedding_with_a_norm_of_its_own_is_refused(trained: dict[str, Any], tmp_path: Path) -> None:
    model_type, own, *_ = CASES["Inkling, three stacks on one module"]
    base = save_base(model_type, own, tmp_path / "base")
    config = LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **trained})
    adapter = save_adapted(base, config, tmp_path / "adapter")
    with pytest.raises(Mismatch, match="normalises the rows") as caught:
        merge(base, adapter, tmp_path / "merged")
    assert caught.value.code == "unsupported_layer"


def test_shared_experts_that_peft_itself_does_not_load_again_are_merged(tmp_path: Path) -> None:
    """transformers' pattern for Laguna, `mlp.shared_expert.`, also matches the name in memory, so PEFT 0.21 drops these
    factors as it loads them: compared with its merge of the model that was just trained."""
    base = save_base("laguna", {**MOE, "layer_types": ["full_attention"] * 2}, tmp_path / "base")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["up_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            parameter.normal_(std=0.2) if "lora_" in name else None
    adapted.save_pretrained(str(tmp_path / "adapter"))
    assert any(".shared_expert." in name for name in merge(base, tmp_path / "adapter", tmp_path / "merged").touched)
    theirs = adapted.merge_and_unload().state_dict()
    assert_all_close(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict(), theirs, 1e-6)


def test_a_vision_transformer_is_merged_under_the_names_that_it_has_on_disk(tmp_path: Path) -> None:
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=4
    )
    torch.manual_seed(3)
    base = save(ViTForImageClassification(config), tmp_path / "base")
    assert "vit.encoder.layer.0.attention.attention.query.weight" in tensors_in(base)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2", "projection"]
    model = ViTForImageClassification.from_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets, modules_to_save=["classifier"]))
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2) if parameter.requires_grad else None
    adapted.save_pretrained(str(tmp_path / "adapter"))
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    ours = ViTForImageClassification.from_pretrained(tmp_path / "merged").state_dict()
    assert_all_close(ours, adapted.merge_and_unload().state_dict(), 1e-6)


DORY: dict[str, Any] = {
    "num_hidden_layers": 3, "n_input_layers": 1, "n_output_layers": 1, "layer_types": ["full_attention"] * 3,
}  # fmt: skip
MADE = {
    "a part of fused attention": ("sarvam_moe", MOE, ["q_proj"], "cuts it from attention.query_key_value"),
    "a part of a fused layer": ("hrm_text", {}, ["up_proj"], "cuts it from mlp.gate_up_proj"),
    "two layers in one": ("dory", DORY, ["q_proj"], "makes one layer of two"),
}  # fmt: skip


@pytest.mark.parametrize("case", MADE)
def test_what_no_tensor_on_disk_is_alone_is_refused_with_the_reason(case: str, tmp_path: Path) -> None:
    model_type, own, modules, reason = MADE[case]
    base = save_base(model_type, own, tmp_path / "base")
    adapter = save_adapted(base, LoraConfig(r=2, target_modules=modules), tmp_path / "adapter")
    with pytest.raises(Mismatch, match=rf"{reason} as it loads {model_type}\. Merge it with PEFT"):
        merge(base, adapter, tmp_path / "merged")


def test_parameters_of_one_shape_and_an_unknown_order_are_refused(tmp_path: Path) -> None:
    """RWKV has key, value, receptance: by name alone the last two would change places."""
    base = save_base("rwkv", {"attention_hidden_size": 32}, tmp_path / "base")
    names = [f"attention.time_mix_{name}" for name in ("key", "value", "receptance")]
    config = LoraConfig(r=2, target_modules=["output"], target_parameters=names)
    adapter = save_adapted(base, config, tmp_path / "adapter")
    with pytest.raises(Mismatch, match="in an order that is not known here"):
        merge(base, adapter, tmp_path / "merged")


def test_one_model_types_names_are_not_anothers(tmp_path: Path) -> None:
    names = {"model.layers.0.self_attn.gate_proj.weight": TensorSpec("F32", (8, 8))}
    target = find_weight("model.layers.0.self_attn.g_proj", "weight", Architecture("lfm3", False, names))
    assert isinstance(target, Target)
    assert target.rule == "as lfm3 is stored"
    assert find_weight("model.layers.0.self_attn.g_proj", "weight", Architecture("llama", False, names)) == []
    base = save_base("llama", {}, tmp_path / "base")
    factors = {"model.layers.0.mlp.router": random_factors(1, outputs=4, inputs=32, rank=2)}
    write_adapter(tmp_path / "adapter", factors, target_modules=["router"])
    with pytest.raises(Mismatch, match=r"nothing named router: if transformers renames .* llama"):
        merge(base, tmp_path / "adapter", tmp_path / "merged")


def test_a_name_that_the_base_has_elsewhere_is_not_taken_for_a_renamed_one(tmp_path: Path) -> None:
    base = save_base("llama", {}, tmp_path / "base")
    write_adapter(tmp_path / "adapter", {"model.layers.9.self_attn.q_proj": random_factors(1, 32, 32, 2)})
    with pytest.raises(Mismatch, match="No tensor matches") as caught:
        merge(base, tmp_path / "adapter", tmp_path / "merged")
    assert "transformers" not in caught.value.message


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_of_gpt_neox_is_found_under_its_older_name(tied: bool, tmp_path: Path) -> None:
    """In memory it is `lm_head` since transformers 5, on disk still `embed_out`."""
    base = save_base("gpt_neox", {"tie_word_embeddings": tied}, tmp_path / "base")
    assert ("embed_out.weight" in tensors_in(base)) is not tied
    adapter = save_adapted(base, LoraConfig(r=2, target_modules=["lm_head", "dense"]), tmp_path / "adapter")
    merge(base, adapter, tmp_path / "merged")
    assert tensors_in(tmp_path / "merged").keys() == tensors_in(base).keys() | {"embed_out.weight"}
    assert relative(logits_of(tmp_path / "merged"), peft_logits(base, adapter)) <= 1e-5


def test_new_tokens_of_a_tied_gpt_neox_reach_its_head_in_memory_too(tmp_path: Path) -> None:
    base = save_base("gpt_neox", {"tie_word_embeddings": True}, tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["dense"], trainable_token_indices={"embed_in": [3, 9]})
    adapter = save_adapted(base, config, tmp_path / "adapter")
    expected = peft_logits(base, adapter)
    model = load_model(base).eval()
    with torch.no_grad(), deltas_applied(model, load_deltas(adapter, open_checkpoint(base).architecture).deltas):
        assert relative(model(IDS).logits, expected) <= 1e-5
    merge(base, adapter, tmp_path / "untied", tied="untie")
    assert "embed_out.weight" in tensors_in(tmp_path / "untied")
    assert relative(logits_of(tmp_path / "untied"), expected) <= 1e-5
