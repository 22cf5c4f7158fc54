"""The proof of merges into mixtures of experts, into models without a causal head, and where memory is short."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    PreTrainedModel,
)

from composer.formats.checkpoints.checkpoint import open_checkpoint
from composer.merge.plan import plan_merge
from composer.merge.proof import Proof, prove
from composer.merge.run import run_merge
from tests.composer.merge.test_merge_quantized import fp8, quantize
from tests.composer.merge.test_proof import PROMPTS, adapter_of
from tests.composer.small_model import SIZES, WIDTHS, save_llama, save_tokenizer
from tests.device import DEVICE


def saved(model: PreTrainedModel, directory: Path) -> Path:
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return directory


def save_mixtral(directory: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    experts: dict[str, Any] = {"num_local_experts": 8, "num_experts_per_tok": 1, "num_hidden_layers": 4}
    return saved(MixtralForCausalLM(MixtralConfig(**{**SIZES, **WIDTHS, **experts})), directory)


def proved(base: Path, adapter: Path, out: Path, *, dequantize: bool = False, **options: Any) -> Proof:
    plan = plan_merge(open_checkpoint(base, dequantize=dequantize), [(adapter, 1.0)], **options)
    proof = run_merge(plan, out, DEVICE, prompts=PROMPTS).proof
    assert proof is not None
    return proof


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ],
    ids=["attention", "experts"],
)
def test_a_mixture_of_experts_is_proved(config: dict[str, Any], tmp_path: Path) -> None:
    base = save_mixtral(tmp_path / "base")
    proof = proved(base, adapter_of(base, tmp_path / "adapter", **config), tmp_path / "out")
    assert (proof.state, proof.within) == ("proved", proof.positions)


def test_a_router_that_returns_scores_is_measured_with_its_delta(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = saved(PhimoeForCausalLM(PhimoeConfig(**SIZES, **WIDTHS, num_local_experts=4)), tmp_path / "base")
    router = next(name for name, _ in AutoModelForCausalLM.from_pretrained(base).named_modules() if "router" in name)
    adapter = adapter_of(base, tmp_path / "adapter", target_modules=[router.rpartition(".")[2]])
    assert proved(base, adapter, tmp_path / "out").state == "proved"


@pytest.mark.parametrize("seed", [2, 5])
def test_where_rounding_alone_sends_tokens_to_other_experts_a_merge_is_undecided_and_a_wrong_one_fails(
    seed: int, tmp_path: Path
) -> None:
    base = save_mixtral(tmp_path / "base", seed)
    adapter = adapter_of(base, tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    proof = proved(base, adapter, tmp_path / "out", dtype="bfloat16")
    assert (proof.state, proof.within < 0.95 * proof.positions) == ("undecided", True), proof
    assert "Rounding to bfloat16 alone does that" in proof.words
    assert proved(base, adapter, tmp_path / "exact").state == "proved"
    plan = plan_merge(open_checkpoint(base), [(adapter, 1.0)], dtype="bfloat16")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(tensors, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    assert prove(plan, tmp_path / "out", PROMPTS, DEVICE).state == "failed"


def test_of_weights_that_transformers_would_make_up_nothing_is_compared(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "d_model": 32,
    }
    tokens: dict[str, Any] = {
        "vocab_size": SIZES["vocab_size"],
        "pad_token_id": 0,
        "bos_token_id": 1,
        "max_position_embeddings": 128,
    }
    heads: dict[str, Any] = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    bart = BartForConditionalGeneration(BartConfig(**sizes, **tokens, **heads))
    classes = LlamaForSequenceClassification(LlamaConfig(**SIZES, **WIDTHS))
    for model, task, targets in (
        (bart, "SEQ_2_SEQ_LM", r".*decoder.*q_proj"),
        (classes, None, ["q_proj"]),
    ):
        base = saved(model, tmp_path / model.config.model_type)
        adapter = base.with_name(f"{base.name}-adapter")
        get_peft_model(model, LoraConfig(r=4, task_type=task, target_modules=targets)).save_pretrained(str(adapter))
        proof = proved(base, adapter, base.with_name(f"{base.name}-out"))
        assert proof.state == "impossible", proof
        assert "as a causal language model it lacks lm_head.weight" in proof.words
        assert str(tmp_path) not in proof.words, "a page shows it"


def test_a_result_that_lost_a_tensor_fails_by_its_name(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapter")
    assert proved(base, adapter, tmp_path / "out").state == "proved"
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    proof = prove(plan_merge(open_checkpoint(base), [(adapter, 1.0)]), tmp_path / "out", PROMPTS, DEVICE)
    assert (proof.state, "it lacks model.layers.1.mlp.up_proj.weight" in proof.why) == ("failed", True), proof


def test_of_a_quantized_base_the_proof_says_that_nothing_was_compared(tmp_path: Path) -> None:
    full = save_llama(tmp_path / "full")
    adapter = adapter_of(full, tmp_path / "adapter")
    shutil.copytree(full, tmp_path / "base")
    quantize(tmp_path / "base", fp8, None)
    proof = proved(tmp_path / "base", adapter, tmp_path / "out", dequantize=True)
    assert (proof.state, "the merge decodes it" in proof.words) == ("impossible", True), proof


def test_where_float32_does_not_fit_the_limit_is_that_of_the_coarser_arithmetic(tmp_path: Path) -> None:
    full = save_llama(tmp_path / "full")
    base = saved(AutoModelForCausalLM.from_pretrained(full).bfloat16(), tmp_path / "base")
    plan = plan_merge(open_checkpoint(base), [(adapter_of(full, tmp_path / "adapter"), 1.0)], dtype="float32")
    run_merge(plan, tmp_path / "out", DEVICE)
    size = (base / "model.safetensors").stat().st_size
    proof = prove(plan, tmp_path / "out", PROMPTS, DEVICE, memory=size * 3 // 2)
    assert (proof.state, proof.computed_in, proof.dtype) == ("proved", "bfloat16", "bfloat16"), proof
