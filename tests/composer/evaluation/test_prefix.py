"""The common beginning of examples is run only once, if a later token needs only keys and values of earlier ones."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from composer.deltas.delta import Layout, LowRank
from composer.evaluation.measure import Encoded, measure
from composer.evaluation.model import LoadedModel
from tests.composer.small_model import SIZES, WIDTHS

GENERATOR = random.Random(1)
PREFIX = tuple(GENERATOR.randrange(3, 40) for _ in range(20))
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 2.0}


def examples(count: int = 5) -> list[Encoded]:
    """Prompts of 22 to 29 tokens with a common beginning, and completions of 2 to 6."""
    lengths = [(2 + 2 * number % 9, 2 + number % 5) for number in range(count)]
    return [
        Encoded((*PREFIX, *(GENERATOR.randrange(3, 40) for _ in range(rest + scored))), 20 + rest)
        for rest, scored in lengths
    ]


def llama(**fields: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SIZES, **WIDTHS, **fields))


SHARING = {
    "llama": llama,
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**SIZES, n_embd=32, n_layer=2, n_head=4, n_positions=128)),
    "bloom": lambda: BloomForCausalLM(BloomConfig(**SIZES, hidden_size=32, n_layer=2, n_head=4)),
    "gemma, whose window is shorter than the prefix": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SIZES, **WIDTHS, head_dim=8, sliding_window=6, pad_token_id=None)
    ),
}
NOT_SHARING = {
    "a state": lambda: MambaForCausalLM(MambaConfig(**SIZES, hidden_size=32, num_hidden_layers=2, state_size=4)),
    "positions by length": lambda: llama(rope_parameters=LONG),
}


def tokens_run(model: Any, encoded: Sequence[Encoded], loaded: LoadedModel, deltas: Sequence[LowRank] = ()) -> int:
    """Measures the examples together, with the same results as separately, and counts the tokens of all passes."""
    torch.manual_seed(3)
    own = LoadedModel(model.eval(), None, loaded.architecture)
    alone = [measure(own, [example], deltas)[0] for example in encoded]
    passed: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda _model, _args, given: passed.append(given["input_ids"].numel()), with_kwargs=True
    )
    together = measure(own, encoded, deltas)
    handle.remove()
    for one, other in zip(together, alone, strict=True):
        assert one.nats == pytest.approx(other.nats, rel=1e-4, abs=1e-4)
        assert (one.tokens, one.exact) == (other.tokens, other.exact)
    return sum(passed)


@pytest.mark.parametrize("kind", SHARING)
def test_the_common_beginning_is_run_once_and_nothing_else_changes(kind: str, loaded: LoadedModel) -> None:
    encoded = examples()
    assert tokens_run(SHARING[kind](), encoded, loaded) < sum(len(example.ids) for example in encoded)


@pytest.mark.parametrize("kind", NOT_SHARING)
def test_a_model_that_needs_more_of_the_past_runs_every_example_in_full(kind: str, loaded: LoadedModel) -> None:
    encoded = examples()
    assert tokens_run(NOT_SHARING[kind](), encoded, loaded) >= sum(len(example.ids) for example in encoded)


def test_the_beginning_is_run_with_the_deltas_that_are_active(loaded: LoadedModel) -> None:
    generator = torch.Generator().manual_seed(5)
    path = "model.layers.0.self_attn.v_proj"
    delta = LowRank(
        module=path,
        weight=f"{path}.weight",
        layout=Layout.LINEAR,
        A=torch.randn(2, 32, generator=generator),
        B=torch.randn(16, 2, generator=generator),
        scale=1.0,
    )
    encoded = examples()
    assert tokens_run(llama(), encoded, loaded, [delta]) < sum(len(example.ids) for example in encoded)


def test_a_prompt_that_is_the_beginning_of_the_others_keeps_a_token_of_its_own(loaded: LoadedModel) -> None:
    encoded = [Encoded((*PREFIX, 5, 6), 20), Encoded((*PREFIX, 5, 6, 7, 8), 22), Encoded((*PREFIX, 9), 20)]
    assert tokens_run(llama(), encoded, loaded) < sum(len(example.ids) for example in encoded)


def test_few_tokens_in_common_are_not_worth_a_pass(loaded: LoadedModel) -> None:
    encoded = [Encoded((3, 4, number, 6, 7), 3) for number in range(3, 8)]
    assert tokens_run(llama(), encoded, loaded) == sum(len(example.ids) for example in encoded)
