"""Every type of adapter beside LoRA: merged as PEFT merges it, and refused by name where nothing can be true to it."""

from pathlib import Path
from typing import Any

import peft
import pytest

from tests.composer.adapted import assert_merged_like_peft, save_adapted
from tests.composer.tiny import MakeModel

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
    "trained tokens": peft.TrainableTokensConfig(token_indices=[7, 2, 30], target_modules=["embed_tokens"]),
}
GPT2_CASES: dict[str, peft.PeftConfig] = {
    "AdaLoRA": peft.AdaLoraConfig(init_r=6, target_r=4, total_step=10, **GPT2),
    "(IA)3": peft.IA3Config(
        target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True
    ),
    "VeRA": peft.VeraConfig(r=4, **GPT2),
    "VB-LoRA": peft.VBLoRAConfig(r=4, vector_length=4, num_vectors=16, topk=2, **GPT2),
    "HiRA": peft.HiraConfig(r=4, **GPT2),
    "FourierFT": peft.FourierFTConfig(n_frequency=20, **GPT2),
}


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
