"""Every adapter type of PEFT: its settings and parts, or why it is refused.

A setting in none of a type's columns may belong to a newer variant: it is refused unless it is off. READERS of a file
in composer/deltas/variants has the function that makes a type's deltas.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from composer.formats.adapters.config import parts
from composer.formats.adapters.config.parts import Options, Shapes, Size

MERGE_NEXT = "Store and serve it as it is, or train a plain LoRA."


@dataclass(frozen=True, slots=True)
class AdapterType:
    """An adapter type. `parts` of a module and parts `shared` by all are named as in the file; `fits` is a function of
    parts.py.

    `rank` and `alpha` are the names and defaults of those settings. `submodules` are parts whose keys end in `.weight`.
    `options` maps the settings that change the result to PEFT's defaults, which have their type; those `by_module` have
    a pattern too. `ignored` settings only matter in training, or are visible in the tensors. `acts_on_bias`: the type
    changes a bias like the outputs; `only_bias`: it adds to the bias alone; `bias_product`: parts that add a product
    with the weight to the bias. `replaces`: the parts are tensors that replace the base's. `needs`: an option that must
    be on, and why.
    """

    parts: tuple[str, ...]
    fits: Callable[[Shapes, Options, Size], Size]
    shared: tuple[str, ...] = ()
    submodules: tuple[str, ...] = ()
    rank: tuple[str, int] = ("", 0)
    alpha: tuple[str, float] = ("", 0.0)
    options: Options = field(default_factory=dict[str, bool | int | float | str])
    by_module: tuple[str, ...] = ()
    choices: Mapping[str, tuple[object, ...]] = field(default_factory=dict[str, tuple[object, ...]])
    ignored: tuple[str, ...] = ()
    patterns: bool = False
    convolutions: bool = False
    acts_on_bias: bool = False
    only_bias: bool = False
    bias_product: tuple[str, ...] = ()
    replaces: bool = False
    needs: tuple[str, str] = ("", "")


_SAVED = "the random projections were not saved (save_projection), and another machine draws others"
_LYCORIS = ("rank_dropout", "module_dropout", "use_effective_conv2d")
KRONECKER = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
_HADAMARD = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
_LOGITS = tuple(f"vblora_logits_{side}{end}" for side in "AB" for end in ("", "_topk_indices", "_topk_weights"))

TYPES: dict[str, AdapterType] = {
    "ADALORA": AdapterType(
        ("lora_A", "lora_B", "lora_E"),
        parts.adalora,
        rank=("init_r", 12),
        alpha=("lora_alpha", 8),
        ignored=(
            "r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step",
            "rank_pattern", "lora_dropout", "init_lora_weights", "megatron_core", "qalora_group_size",
        ),
    ),
    "LOHA": AdapterType(
        _HADAMARD, parts.loha, rank=("r", 8), alpha=("alpha", 8), ignored=_LYCORIS, patterns=True, convolutions=True
    ),
    "LOKR": AdapterType(
        KRONECKER,
        parts.lokr,
        rank=("r", 8),
        alpha=("alpha", 8),
        ignored=(*_LYCORIS, "decompose_both", "decompose_factor", "rank_dropout_scale"),
        patterns=True,
        convolutions=True,
    ),
    "IA3": AdapterType(
        ("ia3_l",), parts.ia3, ignored=("feedforward_modules", "init_ia3_weights"), acts_on_bias=True
    ),
    "VERA": AdapterType(
        ("vera_lambda_b", "vera_lambda_d"),
        partial(parts.vera, "vera_"),
        shared=("vera_A", "vera_B"),
        rank=("r", 256),
        options={"save_projection": True},
        ignored=("projection_prng_key", "vera_dropout", "d_initial"),
        needs=("save_projection", _SAVED),
    ),
    "PVERA": AdapterType(
        ("pvera_lambda_b", "pvera_lambda_d"),
        partial(parts.vera, "pvera_"),
        shared=("pvera_A", "pvera_B"),
        rank=("r", 256),
        options={"save_projection": True},
        ignored=("projection_prng_key", "pvera_dropout", "d_initial", "generator_seed"),
        needs=("save_projection", _SAVED),
    ),
    "RANDLORA": AdapterType(
        ("randlora_lambda", "randlora_gamma", "randlora_A", "randlora_B"),
        parts.randlora,
        shared=("randlora_A", "randlora_B"),
        rank=("r", 32),
        alpha=("randlora_alpha", 640),
        options={"save_projection": True},
        ignored=("projection_prng_key", "randlora_dropout", "sparse", "very_sparse"),
        needs=("save_projection", _SAVED),
    ),
    "VBLORA": AdapterType(
        _LOGITS,
        parts.vblora,
        shared=("vblora_vector_bank",),
        rank=("r", 4),
        options={"topk": 2},
        ignored=(
            "num_vectors", "vector_length", "save_only_topk_weights", "vblora_dropout", "init_vector_bank_bound",
            "init_logits_std",
        ),
    ),
    "UNILORA": AdapterType(
        ("unilora_indices_A", "unilora_indices_B", "unilora_scales_A", "unilora_scales_B"),
        parts.unilora,
        shared=("unilora_theta_d",),
        rank=("r", 4),
        options={"save_indices": False},
        ignored=("proj_seed", "theta_d_length", "unilora_dropout", "init_theta_d_bound"),
        needs=("save_indices", "its random indices were not saved (save_indices), and another machine draws others"),
    ),
    "GRALORA": AdapterType(
        ("gralora_A", "gralora_B", "gralora_A_general", "gralora_B_general"),
        parts.gralora,
        submodules=("gralora_A_general", "gralora_B_general"),
        rank=("r", 32),
        alpha=("alpha", 64),
        options={"hybrid_r": 0},
        ignored=("gralora_dropout", "gralora_k"),
    ),
    "DELORA": AdapterType(
        ("delora_A", "delora_B", "delora_lambda", "delora_w_norm"),
        parts.delora,
        rank=("r", 8),
        ignored=("delora_lambda", "lambda_pattern", "module_dropout", "rank_pattern"),
    ),
    "HIRA": AdapterType(
        ("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B"),
        parts.hira,
        rank=("r", 32),
        ignored=("hira_dropout", "rank_pattern"),
    ),
    "OFT": AdapterType(
        ("oft_R",),
        parts.oft,
        submodules=("oft_R",),
        options={
            "coft": False, "eps": 6e-5, "block_share": False, "use_cayley_neumann": True,
            "num_cayley_neumann_terms": 5,
        },
        ignored=("r", "oft_block_size", "module_dropout"),
    ),
    "BOFT": AdapterType(
        ("boft_R", "boft_s"),
        parts.boft,
        ignored=("boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "boft_dropout"),
    ),
    "HRA": AdapterType(("hra_u",), parts.hra, rank=("r", 8), options={"apply_GS": False}),
    "MISS": AdapterType(
        ("miss_block",),
        parts.miss,
        rank=("r", 64),
        options={"init_weights": True, "mini_r": 1},
        choices={"init_weights": (True, False, "mini", "bat")},
        ignored=("miss_dropout",),
    ),
    "C3A": AdapterType(("c3a_kernel",), parts.c3a, ignored=("block_size", "block_size_pattern")),
    "ROAD": AdapterType(
        ("road_theta", "road_alpha"),
        parts.road,
        options={"variant": "road_1", "group_size": 64},
        choices={"variant": ("road_1", "road_2", "road_4")},
        acts_on_bias=True,
    ),
    "FOURIERFT": AdapterType(
        ("fourierft_spectrum",),
        parts.fourierft,
        options={"scaling": 150.0, "random_loc_seed": 777, "n_frequency": 1000},
        by_module=("n_frequency",),
    ),
    "SUPERTUNING": AdapterType(
        ("supertuning_values", "supertuning_indices", "supertuning_lora_A", "supertuning_lora_B"),
        parts.supertuning,
        submodules=("supertuning_lora_A", "supertuning_lora_B"),
        options={"r": 0, "lora_alpha": 0.0, "save_precomputed_indices": True},
        ignored=("sparsity", "select_top", "lora_dropout"),
        needs=("save_precomputed_indices", "its places were not saved, and another copy of the base has others"),
    ),
    "SHIRA": AdapterType(
        ("shira_weight", "shira_indices"), parts.shira, ignored=("r", "mask_type", "random_seed")
    ),
    "DEFT": AdapterType(
        ("deft_P", "deft_R"),
        parts.deft,
        options={"decomposition_method": "relu", "para": False, "alpha": 0.0},
        choices={"decomposition_method": ("relu", "qr")},
        ignored=("r", "init_scale", "deft_dropout"),
    ),
    "BEFT": AdapterType(("beft_bias",), parts.beft, only_bias=True),
    "GLORA": AdapterType(
        tuple(f"glora_{path}.{part}" for path in "ABCDE" for part in ("Xd", "Xu", "X", "zeros")),
        parts.glora,
        ignored=("r", "config_A_B", "config_C", "config_D_E"),
        acts_on_bias=True,
        bias_product=("glora_C.Xd", "glora_C.X"),
    ),
    "LN_TUNING": AdapterType(
        ("ln_tuning_layers.weight", "ln_tuning_layers.bias"), lambda shapes, options, base: base, replaces=True
    ),
    "TRAINABLE_TOKENS": AdapterType((), lambda shapes, options, base: base, ignored=("token_indices",)),
}  # fmt: skip
"""The supported types. LORA is placed by placement/placement.py; TRAINABLE_TOKENS has only the tokens' rows."""

RETIRED_PARTS = {
    "oft_r": (
        "oft_r are OFT's rotations as PEFT had them up to 0.15.2, in a form that no later one reads",
        "Merge it into its base with PEFT 0.15.2, or train it anew.",
    )
}
"""Part -> why adapters with it cannot be read, and what to do."""

UNSAVED_PARTS = {
    "shira_indices": "the places of its values were not saved, and another machine draws others",
}
"""Part -> why the others are useless without it."""

_PROMPT = "it is a prompt, not a change of weights"
_ROUTED = "it chooses by input, which no weight can express"
_DECOMPOSED = "it depends on a decomposition of the base, or on a network over its weights"
REFUSED: dict[str, str] = {
    **dict.fromkeys(
        (
            "PROMPT_TUNING",
            "P_TUNING",
            "PREFIX_TUNING",
            "MULTITASK_PROMPT_TUNING",
            "CPT",
            "CARTRIDGE",
            "ADAPTION_PROMPT",
        ),
        _PROMPT,
    ),
    **dict.fromkeys(("XLORA", "POLY", "LILY", "SHADOW", "MIXED", "ARROW"), _ROUTED),
    **dict.fromkeys(("OSF", "PSOFT", "ADAMSS", "TINYLORA", "FROD", "PEANUT"), _DECOMPOSED),
    "WAVEFT": "the places of its coefficients are drawn from a seed and not saved",
    "BONE": "it was replaced by MiSS; PEFT converts it",
}
"""Type -> why it cannot be merged exactly."""
