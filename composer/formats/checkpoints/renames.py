"""Models that transformers (5.24, conversion_mapping.py) loads under other names than their checkpoints have.

An adapter names modules as they are in memory. The tables are the inverse of transformers' own, since it is not
imported here. They are kept by model type, because `router` in one model is `gate` in the next, and a guess that hits
some other tensor would be merged silently.
"""

import re

# model type -> substitutions from the name in memory to that on disk, one after another.
_Steps = tuple[tuple[str, str], ...]
_GRANITE_MOE = (
    (r"\.block_sparse_moe\.experts\.gate_up_proj$", ".block_sparse_moe.input_linear.weight"),
    (r"\.block_sparse_moe\.experts\.down_proj$", ".block_sparse_moe.output_linear.weight"),
    (r"\.block_sparse_moe\.router\.", ".block_sparse_moe.router.layer."),
)
_ARIA = (
    (r"\.mlp\.experts\.gate_up_proj$", ".mlp.experts.fc1.weight"),
    (r"\.mlp\.experts\.down_proj$", ".mlp.experts.fc2.weight"),
)
_BAILING = (
    (r"^model\.embed_tokens\.", "model.word_embeddings."),
    (r"\.self_attn\.o_proj\.", ".self_attn.dense."),
    (r"\.self_attn\.forget_gate\.", ".self_attn."),
    (r"\.self_attn\.", ".attention."),
)
_DINO = (
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.down_proj\.", ".mlp.weights_out."),
)
_VIT = (
    *_DINO,
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"^((?:\w+\.)?)layers\.", r"\1encoder.layer."),
)
_STEPS: dict[str, _Steps] = {
    "nemotron_h": ((r"^model\.", "backbone."),),
    "dory": ((r"^model\.embed_tokens\.", "backbone.embeddings."),),
    "gpt_neox": ((r"^lm_head\.", "embed_out."),),
    **dict.fromkeys(("granitemoe", "granitemoeshared", "granitemoehybrid"), _GRANITE_MOE),
    **dict.fromkeys(("aria", "aria_text"), _ARIA),
    "phimoe": ((r"\.mlp\.router\.", ".block_sparse_moe.gate."),),
    "deepseek_v4": (
        (r"\.shared_experts\.gate_proj\.", ".shared_experts.w1."),
        (r"\.shared_experts\.up_proj\.", ".shared_experts.w3."),
        (r"\.shared_experts\.down_proj\.", ".shared_experts.w2."),
        (r"\.compressor\.indexer\.scorer\.", ".indexer."),
        (r"\.compressor\.indexer\.q_b_proj\.", ".indexer.wq_b."),
        (r"\.compressor\.indexer\.", ".indexer.compressor."),
        (r"\.q_([ab])_proj\.", r".wq_\1."),
        (r"\.o_([ab])_proj\.", r".wo_\1."),
        (r"\.kv_proj\.", ".wkv."),
        (r"\.gate_proj\.", ".wgate."),
        (r"\.(attn|ffn)_hc\.", r".hc_\1_"),
        (r"\.hc_head\.hc_", ".hc_head_"),
        (r"\.self_attn\.", ".attn."),
        (r"\.mlp\.", ".ffn."),
        (r"^model\.embed_tokens\.", "embed."),
        (r"^lm_head\.", "head."),
    ),
    "exaone": (
        (r"^model\.embed_tokens\.", "transformer.wte."),
        (r"^model\.layers\.", "transformer.h."),
        (r"\.self_attn\.o_proj\.", ".self_attn.out_proj."),
        (r"\.self_attn\.", ".attn.attention."),
        (r"\.mlp\.gate_proj\.", ".mlp.c_fc_0."),
        (r"\.mlp\.up_proj\.", ".mlp.c_fc_1."),
        (r"\.mlp\.down_proj\.", ".mlp.c_proj."),
        (r"\.input_layernorm\.", ".ln_1."),
        (r"\.post_attention_layernorm\.", ".ln_2."),
        (r"^model\.norm\.", "transformer.ln_f."),
    ),
    "axk2": (
        (r"norm\.mlp\.fc1\.", "norm.W_down."),
        (r"norm\.mlp\.fc2\.", "norm.W_up."),
        (r"\.self_attn\.q_gate_proj\.", ".self_attn.q_b_proj."),
    ),
    **dict.fromkeys(("bailing_hybrid", "sarvam_moe"), _BAILING),
    "hrm_text": ((r"\.self_attn\.o_proj\.", ".attn.o_proj."),),
    "hy_v3": ((r"\.mlp\.gate\.", ".mlp.router.gate."), (r"\.mlp\.shared_experts\.", ".mlp.shared_mlp.")),
    "hy_v4": (
        (r"\.gate_proj\.", ".linear_gate."),
        (r"\.attn_hc\.", ".hc_pre.hc_attn_layer.hc_"),
        (r"\.ffn_hc\.", ".hc_pre.hc_mlp_layer.hc_"),
        (r"\.hc_head\.hc_", ".hc_pre.hc_head.hc_head_"),
    ),
    "kimi_linear": ((r"\.self_attn\.forget_gate\.", ".self_attn."), (r"\.mlp\.", ".block_sparse_moe.")),
    "laguna": ((r"\.mlp\.shared_experts\.", ".mlp.shared_expert."),),
    "lfm3": ((r"\.self_attn\.g_proj\.", ".self_attn.gate_proj."),),
    **dict.fromkeys(("vit", "deit", "beit", "ijepa", "vivit", "vit_mae", "audio-spectrogram-transformer"), _VIT),
    "vit_msn": (*_VIT, (r"^vit\.encoder\.", "encoder.")),
    **dict.fromkeys(("dinov2", "dinov2_with_registers"), _DINO),
}

# model type -> (names in memory, how transformers makes them): tensors that it slices or joins when it loads a model.
_MADE: dict[str, _Steps] = {
    "sarvam_moe": ((r"\.self_attn\.[qkv]_proj\.", "cuts it from attention.query_key_value"),),
    "hrm_text": (
        (r"\.self_attn\.(?:gate|[qkv])_proj\.", "cuts it from attn.gqkv_proj"),
        (r"\.mlp\.(?:gate|up)_proj\.", "cuts it from mlp.gate_up_proj"),
    ),
    "lara_mini": ((r"\.linear_attn\.in_proj_(?:qkv|z|b|a)\.", "cuts it from linear_attn.in_proj"),),
    **dict.fromkeys(
        ("dinov2", "dinov2_with_registers"), ((r"\.mlp\.(?:gate|up)_proj\.", "cuts it from mlp.weights_in"),)
    ),
    "dory": ((r"^model\.layers\.", "makes one layer of two"),),
    **dict.fromkeys(
        ("inkling2", "inkling2_text", "inkling2_loop", "inkling2_loop_text", "inkling_mm_model"),
        ((r"^(?:model|lm_head)\.", "renames, cuts or interleaves what is stored"),),
    ),
    "minimax_m3_vl": ((r"\.gate_up_proj\.", "joins it from gate_proj and up_proj"),),
    **dict.fromkeys(
        ("kimi_linear", "bailing_hybrid", "glm5_next", "olmo_hybrid"),
        ((r"\.conv1d\.", "joins it from q_conv1d, k_conv1d and v_conv1d"),),
    ),
}


def stored_name(model_type: str, name: str) -> str:
    """The name that checkpoints of the model type have for the tensor `name` in memory."""
    for pattern, replacement in _STEPS.get(model_type, ()):
        name = re.sub(pattern, replacement, name)
    return name


def made_by(model_type: str, name: str) -> str:
    """Describes how transformers makes the tensor if it is not a single one on disk; otherwise empty."""
    return next((how for pattern, how in _MADE.get(model_type, ()) if re.search(pattern, name)), "")
