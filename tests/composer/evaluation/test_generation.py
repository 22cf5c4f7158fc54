"""Generated answers against transformers' own generation, alone and in batches."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from composer.deltas.delta import Delta
from composer.errors import Mismatch
from composer.evaluation.evaluate import evaluate, examine
from composer.evaluation.generation import (
    Answer,
    encode_for_generation,
    generate_batch,
    generation_batches,
)
from composer.evaluation.hooks import deltas_applied
from composer.evaluation.measure import encode_prompt
from composer.evaluation.model import LoadedModel, load_model
from composer.formats.recipes.suite import Suite
from composer.formats.recipes.tasks import Generation
from tests.composer.small_model import Load, save_gemma, save_gpt2
from tests.device import DEVICE
from tests.doses import further

PROMPTS = ["say ab", "hello", "a much longer prompt than the others, 0123456789", "b", "count to 42", "say ab again"]


def answers(
    loaded: LoadedModel, prompts: Sequence[str], settings: Generation, deltas: Sequence[Delta] = (), size: int = 99
) -> list[str]:
    """Generates in batches of at most `size` rows."""
    encoded = [encode_for_generation(loaded, prompt, True, settings) for prompt in prompts]
    generated: dict[int, Answer] = {}
    with deltas_applied(loaded.model, deltas):
        for batch in generation_batches(loaded, encoded, settings):
            for begin in range(0, len(batch), size):
                rows = batch[begin : begin + size]
                generated |= dict(
                    zip(rows, generate_batch(loaded, [encoded[row] for row in rows], settings), strict=True)
                )
    return [generated[index].text for index in range(len(prompts))]


def by_transformers(loaded: LoadedModel, prompt: str, count: int, deltas: Sequence[Delta]) -> str:
    ids = torch.tensor([encode_prompt(loaded, prompt, True)], device=loaded.device)
    with deltas_applied(loaded.model, deltas), torch.inference_mode():
        output = loaded.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count,
            eos_token_id=loaded.tokenizer.eos_token_id, pad_token_id=loaded.tokenizer.eos_token_id,
        )  # fmt: skip
    return loaded.tokenizer.decode(output[0, ids.shape[1] :].cpu(), skip_special_tokens=True)


@pytest.mark.parametrize("size", [4, *further(1, 99)])
def test_greedy_answers_are_those_of_transformers_with_deltas_active(
    loaded: LoadedModel, load: Load, size: int
) -> None:
    deltas = load(f"adapter-{size}", seed=5).deltas
    settings = Generation(max_new_tokens=40)
    expected = [by_transformers(loaded, prompt, 40, deltas) for prompt in PROMPTS]
    assert answers(loaded, PROMPTS, settings, deltas, size) == expected
    assert answers(loaded, PROMPTS, settings, (), size) != expected, "the deltas matter"
    assert len({len(text) for text in expected}) > 1, "some end by themselves, so that rows leave the batch"


@pytest.mark.parametrize("save", [save_gpt2, save_gemma])
def test_other_architectures_generate_as_in_transformers(tmp_path: Path, save: object) -> None:
    """Learned positions, which padding must not shift, and a cache with a sliding window."""
    own = load_model(save(tmp_path / "model"), device=DEVICE)  # pyright: ignore[reportCallIssue]
    expected = [by_transformers(own, prompt, 24, ()) for prompt in PROMPTS]
    assert answers(own, PROMPTS, Generation(max_new_tokens=24)) == expected


def test_an_answer_ends_before_the_first_stop_text_or_at_the_limit(loaded: LoadedModel) -> None:
    [full] = answers(loaded, ["hello"], Generation(max_new_tokens=30))
    assert len(full) > 8
    stop = full[4:6]
    [short] = answers(loaded, ["hello"], Generation(max_new_tokens=30, stop=("never there", stop)))
    assert short == full[: full.index(stop)]
    settings = Generation(max_new_tokens=3)
    prompt = encode_for_generation(loaded, "hello", True, settings)
    [answer] = generate_batch(loaded, [prompt], settings)
    assert (answer.text, answer.cut) == (full[:3], True)


def test_draws_depend_on_the_seed_and_the_prompt_and_not_on_what_shares_a_batch(loaded: LoadedModel) -> None:
    drawn = Generation(max_new_tokens=20, temperature=1.0, seed=1)
    together = answers(loaded, PROMPTS, drawn)
    assert answers(loaded, PROMPTS, drawn, size=1) == together
    assert answers(loaded, PROMPTS[::-1], drawn)[::-1] == together
    assert answers(loaded, PROMPTS, drawn.model_copy(update={"seed": 2})) != together
    assert answers(loaded, PROMPTS, Generation(max_new_tokens=20)) != together
    narrow = Generation(max_new_tokens=20, temperature=1.0, top_p=1e-9)
    assert answers(loaded, PROMPTS, narrow) == answers(loaded, PROMPTS, Generation(max_new_tokens=20))


def test_a_prompt_without_room_for_its_answer_is_refused_and_not_cut(loaded: LoadedModel) -> None:
    with pytest.raises(Mismatch, match="the model's context is 128"):
        encode_for_generation(loaded, "a" * 60, True, Generation(max_new_tokens=100))


def suite_of(task: str, *examples: dict[str, object], **fields: object) -> Suite:
    return Suite.from_json(
        {"name": "asked", "kind": "target", "chat": True, "task": task, "examples": list(examples), **fields}
    )


def test_a_generation_suite_scores_answers_and_keeps_each_one(loaded: LoadedModel) -> None:
    given = answers(loaded, ["hello", "say ab"], Generation(max_new_tokens=12))
    suite = suite_of(
        "generation",
        {"prompt": "hello", "completion": f"  {given[0].upper()} "},
        {"prompt": "say ab", "completion": "something else"},
        generation={"max_new_tokens": 12},
    )
    seen: dict[int, object] = {}
    right, wrong = examine(loaded, suite, keep=seen.update)
    assert (right.score, right.answer, wrong.score, wrong.answer) == (1.0, given[0], 0.0, given[1])
    assert seen == {0: right, 1: wrong}
    nll, accuracy = evaluate(loaded, suite)
    assert (accuracy.value, accuracy.n) == (0.5, 2)
    forced = suite_of("teacher_forced", *[example.to_json() for example in suite.examples])
    assert nll.value == pytest.approx(evaluate(loaded, forced)[0].value, rel=1e-5), "of the reference, as in any task"
    cased = Suite.from_json(suite.to_json() | {"scorer": {"name": "match", "settings": {"case": True}}})
    assert examine(loaded, cased)[0].score == 0.0


def test_of_several_choices_the_likeliest_is_the_answer(loaded: LoadedModel) -> None:
    choices = ["a", "ab ab ab", "0", "hello there"]
    example: dict[str, object] = {"prompt": "hello", "completion": "a", "choices": choices}

    def nats(choice: str) -> tuple[float, int]:
        alone = suite_of("teacher_forced", {"prompt": "hello", "completion": choice})
        [result] = examine(loaded, alone)
        return result.nats, result.tokens

    losses = {choice: nats(choice) for choice in choices}
    [result] = examine(loaded, suite_of("multiple_choice", example))
    assert result.answer == min(choices, key=lambda choice: losses[choice][0])
    assert result.nats == pytest.approx(losses["a"][0], rel=1e-5)
    assert result.score == float(result.answer == "a")
    per_token = suite_of("multiple_choice", example, scorer={"name": "likelihood", "settings": {"per": "token"}})
    assert examine(loaded, per_token)[0].answer == min(choices, key=lambda one: losses[one][0] / losses[one][1])
