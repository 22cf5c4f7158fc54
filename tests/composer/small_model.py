"""A real, tiny language model on disk with a character tokenizer, and PEFT adapters for it with a nonzero B."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from composer.deltas.delta import Delta, LowRank, RowwiseDelta
from composer.deltas.variants.load import LoadedAdapter, load_deltas
from composer.formats.checkpoints.checkpoint import open_checkpoint

Load = Callable[..., LoadedAdapter]
"""(name, seed, fields of the config) -> an adapter."""

CHARACTERS = "abcdefghijklmnopqrstuvwxyz ABC0123456789.,?:\n"
SPECIAL = ("<unk>", "<|im_start|>", "<|im_end|>")
ROLES = {"unk_token": "<unk>", "eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_tokenizer(directory: Path, template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *CHARACTERS))}
    characters = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters, **ROLES)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)
    return tokenizer


SIZES: dict[str, Any] = {
    "vocab_size": len(SPECIAL) + len(CHARACTERS), "bos_token_id": None, "eos_token_id": 2, "initializer_range": 0.3,
}  # fmt: skip
WIDTHS: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip


def save_llama(directory: Path, seed: int = 0, tied: bool = False) -> Path:
    torch.manual_seed(seed)
    return _saved(LlamaForCausalLM(LlamaConfig(**SIZES, **WIDTHS, tie_word_embeddings=tied)), directory)


def save_gpt2(directory: Path) -> Path:
    torch.manual_seed(1)
    return _saved(GPT2LMHeadModel(GPT2Config(**SIZES, n_embd=32, n_layer=2, n_head=4, n_positions=128)), directory)


def save_gemma(directory: Path) -> Path:
    """Saves a Gemma, whose embedding multiplies rows by the square root of the hidden size."""
    torch.manual_seed(1)
    config = Gemma3TextConfig(**SIZES, **WIDTHS, head_dim=8, tie_word_embeddings=False, pad_token_id=None)
    return _saved(Gemma3ForCausalLM(config), directory)


def _saved(model: PreTrainedModel, directory: Path) -> Path:
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return directory


def save_adapter(model: torch.nn.Module, directory: Path, seed: int, **config: object) -> PeftModel:
    """Sets every factor to random values instead of training, saves, and returns PEFT's own model with the active
    adapter."""
    torch.manual_seed(seed)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config))  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(std=0.2)
    adapted.save_pretrained(str(directory))
    return adapted.eval()


def load_adapter(base: Path, directory: Path, seed: int, **config: object) -> LoadedAdapter:
    """Such an adapter on the base, as the composer reads it: of rank 4 on q_proj and v_proj by default."""
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], **config}
    save_adapter(AutoModelForCausalLM.from_pretrained(base), directory, seed, **settings)
    return load_deltas(directory, open_checkpoint(base).architecture)


def scaled(adapter: LoadedAdapter, factor: float, name: str) -> LoadedAdapter:
    deltas = tuple(replace(d, scale=d.scale * factor) for d in adapter.deltas if isinstance(d, LowRank))
    return replace(adapter, name=name, deltas=deltas)


def dense(delta: Delta) -> torch.Tensor:
    """The dense matrix, in float64 and in the module's orientation, of a delta that does not read the base."""
    if isinstance(delta, LowRank):
        return delta.scale * delta.B_OR.double() @ delta.A_RI.double()
    assert isinstance(delta, RowwiseDelta)
    return delta.rows(torch.zeros(delta.stored_shape), 0).double()
