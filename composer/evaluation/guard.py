"""A guard suite of instructions with a base's own answers: what an adapter should leave as it is."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from composer.errors import Mismatch
from composer.evaluation.generation import Answer, encode_for_generation, generate_batch, generation_batches
from composer.evaluation.measure import run_batches
from composer.evaluation.model import LoadedModel
from composer.formats.recipes.suite import LEAST_GUARD_EXAMPLES, Example, Suite
from composer.formats.recipes.tasks import Generation


@dataclass(frozen=True, slots=True)
class GuardSuite:
    """The suite, the number of its answers that the limit ended, and the prompts that got no answer."""

    suite: Suite
    cut: int
    unanswered: tuple[str, ...]


def answer_guard(
    loaded: LoadedModel,
    prompts: Iterable[str],
    name: str,
    description: str,
    tokens: int,
    progress: Callable[[int], None] = lambda _count: None,
) -> GuardSuite:
    """The suite of the prompts, each once, with the base's greedy answers of at most `tokens` tokens. Prompts are user
    turns if the base has a chat template, and a model should stop after each answer if it stopped after all of them.
    Prompts without an answer are left out. `progress` gets the number of prompts just answered.

    Raises Mismatch if too few are left for a guard, and what `encode_for_generation` raises.
    """
    asked = tuple(dict.fromkeys(prompts))
    chat = loaded.tokenizer.chat_template is not None
    answers = _answers(loaded, asked, chat, Generation(max_new_tokens=tokens), progress)
    texts = [_text(answer) for answer in answers]
    answered = [(prompt, text) for prompt, text in zip(asked, texts, strict=True) if text.strip()]
    if len(answered) < LEAST_GUARD_EXAMPLES:
        message = f"{name} cannot guard a fit: the base answers {len(answered)} of {len(asked)} prompts."
        step = f"Add prompts that the base answers: a guard has at least {LEAST_GUARD_EXAMPLES}."
        raise Mismatch("not_a_guard", message, subject=name, next_step=step)
    cut = sum(answer.cut for answer, text in zip(answers, texts, strict=True) if text.strip())
    fields: dict[str, Any] = {"name": name, "kind": "guard", "description": description, "chat": chat}
    suite = Suite(**fields, ends=not cut, examples=tuple(Example(prompt, text) for prompt, text in answered))
    known = {prompt for prompt, _ in answered}
    return GuardSuite(suite, cut, tuple(prompt for prompt in asked if prompt not in known))


def _text(answer: Answer) -> str:
    """The answer without a character that the limit cut into its bytes."""
    text = answer.text.rstrip("\ufffd") if answer.cut else answer.text
    return text.replace("\0", "\ufffd")


def _answers(
    loaded: LoadedModel, prompts: Sequence[str], chat: bool, settings: Generation, progress: Callable[[int], None]
) -> list[Answer]:
    """The answers, in the order of the prompts."""
    encoded = [encode_for_generation(loaded, prompt, chat, settings) for prompt in prompts]
    answers: dict[int, Answer] = {}

    def done(batch: Sequence[int], ended: Sequence[Answer]) -> None:
        answers.update(zip(batch, ended, strict=True))
        progress(len(batch))

    batches = generation_batches(loaded, encoded, settings)
    run_batches(loaded, (), batches, lambda batch: generate_batch(loaded, [encoded[i] for i in batch], settings), done)
    return [answers[index] for index in range(len(prompts))]
