"""Names: the modules of an adapter's keys, and the checkpoint's tensors of modules."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from composer.formats.adapters.config.types import TYPES
from composer.formats.checkpoints.checkpoint import Architecture
from composer.formats.checkpoints.renames import stored_name
from composer.formats.checkpoints.tying import EMBEDDINGS, HEADS, embedding_tensors

PEFT_PREFIX = "base_model.model."
SHARED = "base_model"
"""The name for parts that all modules of an adapter share: `base_model.vera_A`."""
TOKENS = "trainable_tokens_delta"
"""Despite its name, new rows of an embedding."""

_SUBMODULES = "|".join(part for adapter in TYPES.values() for part in adapter.submodules)

# Suffix of a key -> part. Raw state dicts (DeepSpeed, FSDP) keep the adapter's name, `default`, in the key.
_PARTS = (
    (re.compile(r"\.lora_(A|B)(?:\.default)?\.weight$"), r"lora_\1"),
    (re.compile(r"\.lora_embedding_(A|B)(?:\.default)?$"), r"lora_embedding_\1"),
    (re.compile(r"\.lora_(A|B)(?:\.default)?\.bias$"), r"lora_\1_bias"),
    (re.compile(r"\.lora_magnitude_vector(?:\.default)?(?:\.weight)?$"), "magnitude"),
    (re.compile(rf"\.({_SUBMODULES})(?:\.default)?\.weight$"), r"\1"),
    (re.compile(r"\.(glora_[A-E])(?:\.default)?\.(X[du]?|zeros)$"), r"\1.\2"),
    (re.compile(r"\.ln_tuning_layers(?:\.default)?\.(weight|bias)$"), r"ln_tuning_layers.\1"),
    (re.compile(r"(?:\.token_adapter)?\.trainable_tokens_delta(?:\.default)?$"), TOKENS),
    (re.compile(r"(?:\.token_adapter)?\.base_layer\.(weight|bias)$"), r"base_layer.\1"),
    (re.compile(r"\.modules_to_save(?:\.default)?\.([^.]+)$"), r"\1"),
    (re.compile(r"\.original_module\..*$"), "ignored"),
    (re.compile(r"\.lora_velora_embed.*$|\.lora_monteclora_sampler\..*$"), "ignored"),
    (re.compile(r"\.([^.]+)$"), r"\1"),
)

TIED_HEAD = "lm_head"
"""The in-memory output head of a model that shares its tensor with the embedding."""
OF_BARE_MODEL, OF_BARE_TRANSFORMER = "with `model.`", "with `transformer.`"
INTO_LANGUAGE_MODEL = "into `language_model.`"
"""The rule for an adapter of the language model alone, on a base with other towers."""
OUT_OF_LANGUAGE_MODEL = "without `language_model.`"

# (rule, pattern, replacement): in-memory name -> on-disk name, for checkpoints that were saved under other names.
_RENAMES = (
    ("without `transformer.`", re.compile(r"^transformer\.(.+)$"), r"\1"),
    (OF_BARE_TRANSFORMER, re.compile(r"^((?:h|wte|wpe|ln_f)\b.*)$"), r"transformer.\1"),
    (OF_BARE_MODEL, re.compile(r"^((?:layers|embed_tokens|norm)\b.*)$"), r"model.\1"),
    ("`language_model.model.`", re.compile(r"^model\.language_model\.(.+)$"), r"language_model.model.\1"),
    ("`language_model.lm_head`", re.compile(r"^(lm_head\..+)$"), r"language_model.\1"),
    (OUT_OF_LANGUAGE_MODEL, re.compile(r"^model\.language_model\.(.+)$"), r"model.\1"),
    ("`block_sparse_moe.`", re.compile(r"^(.+)\.mlp\.((?:gate|experts)\..+)$"), r"\1.block_sparse_moe.\2"),
    ("without `model.`", re.compile(r"^model\.(.+)$"), r"\1"),
    (INTO_LANGUAGE_MODEL, re.compile(r"^model\.((?:layers|embed_tokens|norm)\b.*)$"), r"language_model.model.\1"),
    (INTO_LANGUAGE_MODEL, re.compile(r"^model\.((?:layers|embed_tokens|norm)\b.*)$"), r"model.language_model.\1"),
)
_OF_A_LANGUAGE_MODEL = re.compile(r"model\.(?:layers|embed_tokens|norm)\b|lm_head\.")


@dataclass(frozen=True, slots=True)
class Key:
    """A parsed adapter key. `part` is `lora_A`, `magnitude`, `base_layer.bias`, … or a parameter's name."""

    key: str
    module: str
    part: str


@dataclass(frozen=True, slots=True)
class Target:
    """The checkpoint tensor of a parameter; `rule` names the renaming that matched, empty for an exact match."""

    weight: str
    tied: bool
    rule: str = ""


@lru_cache(maxsize=8192)  # called three times for every key, and adapters of one model have the same keys
def split_key(key: str) -> Key:
    """Splits an adapter's key into module and part; the module is empty for an unknown part."""
    path = key.removeprefix(PEFT_PREFIX)
    for pattern, part in _PARTS:
        match = pattern.search(path)
        if match:
            return Key(key, path[: match.start()], match.expand(part))
    return Key(key, "", path)


def lacks_prefix(keys: Iterable[str]) -> bool:
    """Whether there is a module's key, and none with PEFT's prefix."""
    modules = [key for key in keys if key.rpartition(".")[0] != SHARED]
    return bool(modules) and not any(key.startswith(PEFT_PREFIX) for key in modules)


def is_raw(key: str) -> bool:
    """Whether the adapter's name is in the key, as in a dump of the model's own state."""
    return "default" in key.split(".")


def is_copy(key: str) -> bool:
    """With `bias="all"` PEFT saves the bias of a fully saved module a second time, by its path in memory; it loads the
    other one."""
    return ".modules_to_save." in key


def find_weight(module: str, parameter: str, architecture: Architecture) -> Target | list[str]:
    """The tensor that is `module.parameter` on disk, or the list of candidates if there is none or several."""
    name = f"{module}.{parameter}"
    if architecture.tied and parameter == "weight" and module.split(".")[-1] in HEADS:
        # Tied wins over an exact match: a head that is stored too has the same bytes (Checkpoint.own_head), and loading
        # makes both one tensor again.
        embeddings = embedding_tensors(architecture.tensors)
        return Target(embeddings[0], True, "tied to the embedding") if len(embeddings) == 1 else embeddings
    stored = stored_name(architecture.model_type, name)
    for path, rule in ((name, ""), (stored, f"as {architecture.model_type} is stored")):
        if path in architecture.tensors:
            return Target(path, _is_tied_tensor(path, architecture), rule)
    hits: dict[str, str] = {}
    for path, (rule, pattern, replacement) in product((name, stored), _RENAMES):
        renamed = pattern.sub(replacement, path)
        if renamed != path and renamed in architecture.tensors:
            hits.setdefault(renamed, rule)
    if len(hits) != 1:
        return sorted(hits)
    weight, rule = next(iter(hits.items()))
    return Target(weight, _is_tied_tensor(weight, architecture), rule)


def elsewhere(target: Target, architecture: Architecture) -> bool:
    """Whether the module's path comes from another model than the base: one without a head (`AutoModel`), one that
    contains the language model, or the language model alone."""
    if target.rule == OUT_OF_LANGUAGE_MODEL:
        return all(map(_OF_A_LANGUAGE_MODEL.match, architecture.tensors))
    return target.rule in (INTO_LANGUAGE_MODEL, OF_BARE_MODEL, OF_BARE_TRANSFORMER)


def is_head(module: str) -> bool:
    """Whether the path ends in a name of an output head or classifier."""
    return module.split(".")[-1] in (*HEADS, "score", "classifier")


def is_embedding(module: str) -> bool:
    """Whether the path ends in a name of an input embedding."""
    return module.split(".")[-1] in EMBEDDINGS


def is_vocabulary(module: str) -> bool:
    """Whether one side of the module's weight counts tokens."""
    return module.split(".")[-1] in (*HEADS, *EMBEDDINGS)


def _is_tied_tensor(name: str, architecture: Architecture) -> bool:
    # Called for each module: others that look like an embedding matter only if this one does.
    return architecture.tied and bool(embedding_tensors([name])) and embedding_tensors(architecture.tensors) == [name]
