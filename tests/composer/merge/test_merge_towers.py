"""Models with a language model beside other towers, whose modules have other names in memory than on disk."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from composer.conflicts.report import conflicts
from composer.conflicts.view import cells_of, maps
from composer.deltas.variants.load import load_deltas
from composer.errors import Mismatch
from composer.formats.adapters.facts import read_adapter
from composer.formats.adapters.inspection import inspect
from composer.formats.adapters.placement.naming import (
    INTO_LANGUAGE_MODEL,
    OF_BARE_MODEL,
    OF_BARE_TRANSFORMER,
    OUT_OF_LANGUAGE_MODEL,
    Target,
    elsewhere,
    find_weight,
)
from composer.formats.adapters.placement.placement import place
from composer.formats.adapters.placement.result import OTHER_PATHS
from composer.formats.adapters.serving import loads_in
from composer.formats.checkpoints.checkpoint import Architecture, open_checkpoint
from composer.formats.checkpoints.header import TensorSpec
from composer.formats.recipes.weights import Weight, layer_of, parse_rule, tower_of
from composer.methods.combine import combine_deltas
from registry.api.pages.html.drawings import in_layers
from tests.composer.adapted import assert_all_close, merge
from tests.composer.formats.test_adapter import facts_of
from tests.composer.tiny import load_model, tensors_in

TEXT: dict[str, Any] = {
    "vocab_size": 120, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
SEEN: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip


def llava() -> PreTrainedModel:
    text, seen = LlamaConfig(**TEXT, tie_word_embeddings=False), CLIPVisionConfig(**SEEN)
    return LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=seen, image_token_index=119))


def gemma() -> PreTrainedModel:
    config = {"text_config": {**TEXT, "head_dim": 8}, "vision_config": SEEN, "image_token_index": 119}
    return Gemma3ForConditionalGeneration(Gemma3Config(**config, mm_tokens_per_image=4))


def qwen() -> PreTrainedModel:
    seen = {
        "hidden_size": 32, "intermediate_size": 48, "depth": 2, "num_heads": 4, "patch_size": 8,
        "out_hidden_size": 32, "fullatt_block_indexes": [1],
    }  # fmt: skip
    text = {**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=seen))


@pytest.fixture
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    make: Callable[[], PreTrainedModel] = request.param
    make().float().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapter_of(model: torch.nn.Module, targets: object, directory: Path) -> Path:
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=targets))  # pyright: ignore[reportArgumentType]
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    adapted.save_pretrained(str(directory))
    return directory


@pytest.mark.parametrize(
    ("base", "targets"),
    [
        (llava, ["q_proj", "v_proj"]),
        (llava, ["multi_modal_projector.linear_1", "lm_head"]),
        (llava, r".*vision_tower.*\.fc1"),
        (llava, r".*language_model.*\.(q_proj|down_proj)"),
        (gemma, ["q_proj", "v_proj"]),
        (qwen, ["q_proj", "qkv", "down_proj"]),
    ],
    indirect=["base"],
)
def test_all_towers_are_merged_under_the_names_that_they_have_on_disk(
    base: Path, targets: object, tmp_path: Path
) -> None:
    adapter = adapter_of(AutoModelForImageTextToText.from_pretrained(base), targets, tmp_path / "adapter")
    assert merge(base, adapter, tmp_path / "merged").touched
    theirs = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), adapter).merge_and_unload()
    theirs.save_pretrained(tmp_path / "theirs")
    ours, expected = tensors_in(tmp_path / "merged"), tensors_in(tmp_path / "theirs")
    assert ours.keys() == expected.keys()
    assert_all_close(ours, expected, 1e-6)
    assert OTHER_PATHS not in {
        finding.code for finding in inspect(adapter, open_checkpoint(base).architecture).findings
    }


@pytest.mark.parametrize("base", [llava, gemma, qwen], indirect=True)
def test_an_adapter_of_the_language_model_alone_finds_it_with_a_warning_that_no_server_does(
    base: Path, tmp_path: Path
) -> None:
    torch.manual_seed(2)
    adapter = adapter_of(LlamaForCausalLM(LlamaConfig(**TEXT)), ["q_proj", "down_proj"], tmp_path / "adapter")
    checkpoint = open_checkpoint(base)
    plan = merge(base, adapter, tmp_path / "merged")
    changed = plan.touched
    assert len(changed) == 4
    if "model.layers.0.mlp.down_proj.weight" in changed:  # its name on disk: the name in memory is unknown here
        return
    assert all("language_model" in name for name in changed)
    assert OTHER_PATHS in {finding.code for finding in plan.findings}
    opened = read_adapter(adapter)
    placed = place(opened.config, opened.header, checkpoint.architecture)
    assert [finding.code for finding in placed.findings] == [OTHER_PATHS]
    for server in ("vllm", "sglang", "lorax", "llamacpp", "peft"):
        loading = loads_in(opened.config, facts_of(adapter), placed, server)
        assert not loading.loads
        assert "paths are those of another model" in loading.reasons[0]


def test_a_merge_says_so_where_keys_are_those_of_a_model_without_a_head(tmp_path: Path) -> None:
    text_model = LlamaForCausalLM(LlamaConfig(**TEXT))
    text_model.save_pretrained(tmp_path / "base")
    adapter = adapter_of(text_model.model, ["q_proj"], tmp_path / "adapter")
    plan = merge(tmp_path / "base", adapter, tmp_path / "merged")
    assert plan.touched
    assert OTHER_PATHS in {finding.code for finding in plan.findings}


@pytest.mark.parametrize("base", [llava], indirect=True)
def test_the_language_part_of_an_adapter_fits_the_language_model_alone(base: Path, tmp_path: Path) -> None:
    targets = r".*language_model.*\.q_proj"
    adapter = adapter_of(AutoModelForImageTextToText.from_pretrained(base), targets, tmp_path / "adapter")
    LlamaForCausalLM(LlamaConfig(**TEXT)).save_pretrained(tmp_path / "text")
    alone = open_checkpoint(tmp_path / "text")
    assert [finding.code for finding in inspect(adapter, alone.architecture).findings] == [OTHER_PATHS]
    assert len(merge(tmp_path / "text", adapter, tmp_path / "merged").touched) == 2
    assert load_model(tmp_path / "merged") is not None


NAMES = {
    "model.language_model.layers.0.mlp.up_proj": "language_model.model.layers.0.mlp.up_proj",
    "model.language_model.layers.1.mlp.up_proj": "model.layers.1.mlp.up_proj",
    "model.layers.2.mlp.up_proj": "model.language_model.layers.2.mlp.up_proj",
    "model.layers.3.mlp.up_proj": "language_model.model.layers.3.mlp.up_proj",
    "model.layers.4.mlp.up_proj": "layers.4.mlp.up_proj",
    "layers.5.mlp.up_proj": "model.layers.5.mlp.up_proj",
    "transformer.h.0.attn.c_attn": "h.0.attn.c_attn",
    "h.1.attn.c_attn": "transformer.h.1.attn.c_attn",
    "model.visual.blocks.0.attn.qkv": "visual.blocks.0.attn.qkv",
    "model.vision_tower.encoder.layers.0.fc1": "vision_tower.encoder.layers.0.fc1",
    "model.multi_modal_projector.linear_1": "multi_modal_projector.linear_1",
    "model.layers.6.mlp.experts.3.w1": "model.layers.6.block_sparse_moe.experts.3.w1",
    "lm_head": "language_model.lm_head",
}


@pytest.mark.parametrize("module", NAMES)
def test_a_module_is_found_where_a_checkpoint_has_it(module: str) -> None:
    architecture = Architecture("", False, {f"{NAMES[module]}.weight": TensorSpec("F32", (8, 8))})
    target = find_weight(module, "weight", architecture)
    assert isinstance(target, Target)
    assert (target.weight, bool(target.rule)) == (f"{NAMES[module]}.weight", True)
    others = (INTO_LANGUAGE_MODEL, OUT_OF_LANGUAGE_MODEL, OF_BARE_MODEL, OF_BARE_TRANSFORMER)
    assert elsewhere(target, architecture) is (target.rule in others)


def test_a_module_that_could_be_in_two_places_is_in_neither() -> None:
    names = ("language_model.model.layers.0.mlp.up_proj.weight", "layers.0.mlp.up_proj.weight")
    architecture = Architecture("", False, dict.fromkeys(names, TensorSpec("F32", (8, 8))))
    assert find_weight("model.layers.0.mlp.up_proj", "weight", architecture) == sorted(names)


def test_a_rule_of_layers_names_its_tower_and_maps_keep_towers_apart(tmp_path: Path) -> None:
    """Layer 0 of the vision tower is not layer 0 of the language model."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    torch.manual_seed(0)
    llava().save_pretrained(base)
    model = get_peft_model(llava(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model.save_pretrained(str(adapter))
    architecture = open_checkpoint(base).architecture
    loaded = load_deltas(adapter, architecture)
    with pytest.raises(Mismatch) as refused:
        combine_deltas([loaded], [Weight(1.0, (parse_rule("0=0"),))])
    assert refused.value.code == "rule_ambiguous"
    assert all(tower in str(refused.value) for tower in {tower_of(delta.module) for delta in loaded.deltas})
    left = {
        rule: {delta.module for delta in combine_deltas([loaded], [Weight(1.0, (parse_rule(rule),))]).deltas}
        for rule in ("0/*vision_tower*=0", "0/*=0")
    }
    everything = {delta.module for delta in loaded.deltas}
    assert len(everything) == 8
    assert {module for module in everything if ".layers.0." in module and "vision_tower" in module} == (
        everything - left["0/*vision_tower*=0"]
    )
    assert everything - left["0/*=0"] == {module for module in everything if ".layers.0." in module}
    report = conflicts([loaded, replace(loaded, name="again")], [1.0, 1.0])
    assert len(report.pairs[0].layers) == 4
    assert {(row["tower"], row["layer"]) for row in report.to_json()["whole"]["layers"]} == {
        (tower_of(module), layer_of(module)) for module in everything
    }
    (drawn,) = maps(report.to_json(), "cosine").drawn
    assert len(drawn.cells) == drawn.modules == 8, "no module overwrites another"
    assert {kind for kind, _ in drawn.cells} == {
        f"{tower} {part}_proj" for tower in ("vision_tower", "language_model") for part in "qv"
    }
    whisper = [f"model.{side}.layers.{layer}.self_attn.q_proj" for side in ("encoder", "decoder") for layer in (0, 1)]
    assert set(cells_of(whisper).values()) == {(f"{side} q_proj", n) for side in ("encoder", "decoder") for n in (0, 1)}
    assert set(in_layers(whisper).values()) == set(cells_of(whisper).values())
    assert cells_of(["model.layers.0.self_attn.q_proj"]) == {"model.layers.0.self_attn.q_proj": ("q_proj", 0)}
