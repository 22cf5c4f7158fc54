"""Fused experts: PEFT trains one stack of pairs, the checkpoint may keep each expert on its own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

from composer.deltas.variants.load import load_deltas
from composer.errors import Mismatch
from composer.evaluation.hooks import deltas_applied
from composer.formats.adapters.facts import facts, read_adapter
from composer.formats.adapters.placement.placement import place
from composer.formats.checkpoints.checkpoint import open_checkpoint
from tests.composer.adapted import (
    IDS,
    assert_merged_like_peft,
    logits,
    merge,
    peft_logits,
    relative,
    save_adapted,
)
from tests.composer.handmade import random_factors, write_adapter
from tests.composer.tiny import load_model, tensors_in

SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "max_position_embeddings": 32, "tie_word_embeddings": False,
}  # fmt: skip
GATE, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"


def mixtral(width: int = 24) -> PreTrainedConfig:
    return MixtralConfig(**SMALL, intermediate_size=width, num_local_experts=4)


def qwen3(width: int = 8) -> PreTrainedConfig:
    return Qwen3MoeConfig(
        **SMALL, intermediate_size=24, moe_intermediate_size=width, num_experts=4, num_experts_per_tok=2, head_dim=8
    )


def gpt_oss(width: int = 12) -> PreTrainedConfig:
    layers = ["full_attention", "full_attention"]
    return GptOssConfig(**SMALL, intermediate_size=width, num_local_experts=4, head_dim=8, layer_types=layers)


def save_base(config: PreTrainedConfig, directory: Path, **options: Any) -> Path:
    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_config(config).to(torch.float32)
    with torch.no_grad():  # experts that do something: the default is 0.02
        for parameter in model.parameters():
            parameter.mul_(10) if parameter.dim() == 3 else None
    model.save_pretrained(directory, **options)
    return directory


def lora(*parameters: str, **settings: Any) -> LoraConfig:
    given = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"], "target_parameters": list(parameters), **settings}
    return LoraConfig(**given)


CASES: dict[str, tuple[Callable[..., PreTrainedConfig], int, LoraConfig]] = {
    "Mixtral": (mixtral, 24, lora(GATE, DOWN)),
    "Mixtral, targets in another order": (mixtral, 24, lora(DOWN, GATE)),
    "Mixtral, one target": (mixtral, 24, lora(DOWN)),
    "Mixtral, rsLoRA": (mixtral, 24, lora(GATE, use_rslora=True)),
    "Qwen3-MoE": (qwen3, 8, lora(GATE, DOWN)),
    "Qwen3-MoE, patterns": (
        qwen3, 8, lora(GATE, DOWN, rank_pattern={"down_proj": 3}, alpha_pattern={"1.mlp.experts.gate_up_proj": 7}),
    ),
    "GPT-OSS, stored inputs first": (gpt_oss, 12, lora(GATE, DOWN)),
    "GPT-OSS, square": (gpt_oss, 16, lora(DOWN)),
    "Mixtral, bare names": (mixtral, 24, lora("gate_up_proj", "down_proj")),
    "a router": (mixtral, 24, lora("mlp.gate.weight")),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_merge_equals_pefts_own(case: str, tmp_path: Path) -> None:
    make, width, config = CASES[case]
    base = save_base(make(width), tmp_path / "base")
    adapter = save_adapted(base, config, tmp_path / "adapter")
    assert_merged_like_peft(base, adapter, tmp_path / "merged")
    assert tensors_in(base).keys() == tensors_in(tmp_path / "merged").keys()


def test_a_checkpoint_that_is_fused_on_disk_takes_the_same_adapter(tmp_path: Path) -> None:
    base = save_base(mixtral(), tmp_path / "base")
    fused = save_base(mixtral(), tmp_path / "fused", save_original_format=False)
    assert any(name.endswith("experts.gate_up_proj") for name in tensors_in(fused))
    adapter = save_adapted(base, lora(GATE, DOWN), tmp_path / "adapter")
    merge(fused, adapter, tmp_path / "merged")
    assert relative(logits(tmp_path / "merged"), peft_logits(base, adapter)) <= 1e-5


@pytest.mark.parametrize("make", [mixtral, qwen3, gpt_oss])
def test_experts_on_a_loaded_model_are_the_adapter_itself(
    make: Callable[..., PreTrainedConfig], tmp_path: Path
) -> None:
    base = save_base(make(), tmp_path / "base")
    adapter = save_adapted(base, lora(GATE, DOWN), tmp_path / "adapter")
    model = load_model(base).eval()
    with torch.no_grad(), deltas_applied(model, load_deltas(adapter, open_checkpoint(base).architecture).deltas):
        assert relative(model(IDS).logits, peft_logits(base, adapter)) <= 1e-5


def test_an_adapter_of_separate_experts_is_added_to_their_own_tensors(tmp_path: Path) -> None:
    """Trained when each expert was a module of its own: matched directly with the checkpoint's names."""
    base = save_base(mixtral(), tmp_path / "base")
    name = "model.layers.1.block_sparse_moe.experts.2.w3"
    A, B = random_factors(1, outputs=24, inputs=16, rank=3)
    seen = write_adapter(tmp_path / "adapter", {name: (A, B)}, target_modules=["w3"], lora_alpha=6)
    plan = merge(base, tmp_path / "adapter", tmp_path / "merged")
    assert plan.touched == [f"{name}.weight"]
    before, after = (tensors_in(where)[f"{name}.weight"] for where in (base, tmp_path / "merged"))
    scale = seen.placed.low_rank[0].scale
    assert relative(after, before.double() + scale * torch.from_numpy(B @ A)) <= 1e-6


def test_facts_count_a_stack_as_one_module(tmp_path: Path) -> None:
    base = save_base(mixtral(), tmp_path / "base")
    adapter = read_adapter(save_adapted(base, lora(GATE, DOWN), tmp_path / "adapter"))
    for architecture in (None, open_checkpoint(base).architecture):
        placed = place(adapter.config, adapter.header, architecture)
        assert placed.findings == []
        shapes = {module.module: module.shape for module in placed.modules}
        assert shapes["model.layers.0.mlp.experts.gate_up_proj"] == (4, 48, 16)
        assert shapes["model.layers.0.mlp.experts.down_proj"] == (4, 16, 24)
        read = facts(adapter.config, adapter.header, placed)
        assert (read.modules, read.rank_max, read.targets) == (6, 2, ("down_proj", "gate_up_proj", "q_proj"))


def test_a_stack_of_another_size_is_an_error_that_names_the_parameter(tmp_path: Path) -> None:
    base, other = save_base(mixtral(), tmp_path / "base"), save_base(mixtral(40), tmp_path / "other")
    adapter = save_adapted(base, lora(DOWN), tmp_path / "adapter")
    with pytest.raises(Mismatch, match=r"experts\.down_proj is made for 4 x 16 x 24; the base's is 4 x 16 x 40"):
        load_deltas(adapter, open_checkpoint(other).architecture)


def test_a_targeted_parameter_without_tensors_is_an_error(tmp_path: Path) -> None:
    base = save_base(mixtral(), tmp_path / "base")
    adapter = save_adapted(base, lora(DOWN), tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "target_parameters": [DOWN, "mlp.wrong"]}))
    with pytest.raises(Mismatch, match=r"mlp\.wrong"):
        load_deltas(adapter, open_checkpoint(base).architecture)


def test_factors_for_more_experts_than_any_model_has_are_an_error_that_names_the_parameter(tmp_path: Path) -> None:
    factors = random_factors(1, outputs=1, inputs=1, rank=5000)
    stated = {"r": 1, "lora_alpha": 1, "rank_pattern": {}, "target_modules": [], "target_parameters": [DOWN]}
    seen = write_adapter(tmp_path / "adapter", {"model.layers.0.mlp.experts": factors}, **stated)
    assert [(finding.code, finding.subject) for finding in seen.findings] == [
        ("rank_mismatch", f"model.layers.0.{DOWN}")
    ]
    assert "5000 experts" in seen.findings[0].message
