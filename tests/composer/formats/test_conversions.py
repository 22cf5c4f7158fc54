"""Every model that transformers converts on loading: its checkpoints are matched, or refused with a reason. Fails if a
new release of transformers renames, cuts or joins tensors that renames.py does not know."""

from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from composer.formats.adapters.placement.experts import find_stack
from composer.formats.adapters.placement.naming import Target, find_weight
from composer.formats.checkpoints.checkpoint import Architecture
from composer.formats.checkpoints.header import TensorSpec
from composer.formats.checkpoints.renames import made_by
from tests.doses import one_of_each

# Fields of configs that build no model with their defaults.
OWN: dict[str, dict[str, Any]] = {
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "hunyuan_v1_moe": {"head_dim": 64},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 256, "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
}  # fmt: skip
CONVERTED = {
    kind: str([(conversion.source_patterns, conversion.target_patterns) for conversion in conversions])
    for kind, name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items())
    if (conversions := get_checkpoint_conversion_mapping(kind) or get_checkpoint_conversion_mapping(str(name)))
}
"""The models, each with the part that its conversion renames."""


LAYERS = 12
"""Enough for each kind of layer of a model; all of them would take four times as long."""


def shallow(config: PretrainedConfig) -> PretrainedConfig:
    deep = getattr(config, "num_hidden_layers", 0)
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == deep > LAYERS:
            setattr(config, name, value[:LAYERS])
    if deep > LAYERS:
        config.num_hidden_layers = LAYERS
    return config


def stored_by(model: PreTrainedModel, kind: str) -> Architecture:
    """The names and shapes that transformers itself would save."""
    tensors = revert_weight_conversion(model, dict(model.state_dict()))
    return Architecture(kind, False, {name: TensorSpec("F32", tuple(tensor.shape)) for name, tensor in tensors.items()})


@pytest.mark.parametrize("kind", one_of_each(CONVERTED, CONVERTED.__getitem__))
def test_each_matrix_of_a_model_that_is_converted_on_loading_is_found_once_or_refused_with_a_reason(kind: str) -> None:
    with torch.device("meta"):  # in its usual width, and without its numbers
        model = AutoModelForCausalLM.from_config(shallow(AutoConfig.for_model(kind, **OWN.get(kind, {}))))
    architecture = stored_by(model, kind)
    located, lost = dict[str, str](), list[str]()
    for path, parameter in model.named_parameters():
        owner, _, name = path.rpartition(".")
        target = find_weight(owner, name, architecture)
        if isinstance(target, Target):
            assert architecture.tensors[target.weight].shape == tuple(parameter.shape), path
            assert located.setdefault(target.weight, path) == path
        elif parameter.dim() > 1 and not name.endswith("bias") and not find_stack(architecture, owner, name):
            lost += [path] if not made_by(kind, path) else []
    assert not lost, f"transformers {transformers.__version__} stores these of {kind} under names not known here"
