"""Whether a model's output head shares the input embedding's tensor: by its config and its files."""

from collections.abc import Iterable, Mapping
from typing import Any, cast

from composer.errors import InvalidFile
from composer.formats.checkpoints.files import StoredFile, read_range
from composer.formats.checkpoints.header import TensorEntry

HEADS = ("lm_head", "embed_out")
EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "embeddings")
# transformers' models (5.24) that tie nothing whatever their config says: their `_tied_weights_keys` are empty.
NEVER_TIED = frozenset(
    {"bailing_hybrid", "cpmant", "inkling2_loop_text", "inkling2_text", "inkling_text", "kimi_linear", "nemotron_h"}
)
_CAUSAL_SUFFIXES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_BLOCK_BYTES = 4 << 20

StoredTensor = tuple[StoredFile, TensorEntry]


def embedding_tensors(tensors: Iterable[str]) -> list[str]:
    """Tensors that look like a model's input embedding: exactly one in a text model."""
    return _weights_of(EMBEDDINGS, tensors)


def head_tensors(tensors: Iterable[str]) -> list[str]:
    """Tensors that look like a model's output head: none if it is tied and stored once."""
    return _weights_of(HEADS, tensors)


def _weights_of(modules: tuple[str, ...], tensors: Iterable[str]) -> list[str]:
    return sorted(name for name in tensors if name.endswith(".weight") and name.split(".")[-2] in modules)


def said_tied(config: Mapping[str, Any], tensors: Iterable[str]) -> bool:
    """Whether the head shares the embedding's tensor. By the config, unless the model's class ties nothing. If the
    config is silent, a causal model without a head does."""
    model_type: object = config.get("model_type")
    if not isinstance(model_type, str | None):
        raise _bad_config("model_type is not text")
    if model_type in NEVER_TIED and head_tensors(tensors):
        return False
    nested: object = config.get("text_config")
    sources = [config, cast("dict[str, Any]", nested)] if isinstance(nested, dict) else [config]
    for source in sources:
        stated: object = source.get("tie_word_embeddings")
        if isinstance(stated, bool):
            return stated
    architectures: object = config.get("architectures") or []
    if not isinstance(architectures, list):
        raise _bad_config("architectures is not a list")
    architectures = cast("list[object]", architectures)
    causal = any(str(name).endswith(_CAUSAL_SUFFIXES) for name in architectures)
    return causal and not head_tensors(tensors)


def _bad_config(why: str) -> InvalidFile:
    next_step = "Save or download the checkpoint again."
    return InvalidFile("bad_config", f"config.json: {why}.", subject="config.json", next_step=next_step)


def same_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two stored tensors are equal, so that loading ties them. transformers (5.24) ties a head that is stored
    beside the embedding only then. Stops at the first block that differs; another dtype or shape needs no comparison.
    """
    (file, entry), (other_file, other_entry) = one, other
    if entry.spec != other_entry.spec:
        return False
    for done in range(0, entry.size_bytes, _BLOCK_BYTES):
        end = min(entry.size_bytes, done + _BLOCK_BYTES)
        mine, theirs = (
            read_range(of, at.begin + done, at.begin + end) for of, at in ((file, entry), (other_file, other_entry))
        )
        if mine != theirs:
            return False
    return True
