"""Selector phrases: a few words at the beginning of a prompt, which tell an adapter of several tasks which is meant.

Where suites have the same prompts and want different answers, no adapter serves both without them.
"""

from collections.abc import Sequence
from dataclasses import replace

from composer.formats.recipes.suite import Example, Suite

MAX_PHRASE_CHARS = 100


def problem_of_phrase(phrase: str) -> str:
    """Why a text cannot be a phrase; empty if it can."""
    if not phrase.strip():
        return "it is empty"
    if len(phrase) > MAX_PHRASE_CHARS:
        return f"it has more than {MAX_PHRASE_CHARS} characters"
    if phrase != phrase.strip() or not phrase.isprintable():
        return "it is not one line without spaces around it"
    return ""


def phrase_of(suite: str) -> str:
    """A phrase made of a suite's name: `sql-exact` becomes `Sql exact:`."""
    words = suite.replace("-", " ").replace("_", " ").strip()
    return f"{words[:1].upper()}{words[1:]}"[: MAX_PHRASE_CHARS - 1] + ":"


def with_phrase(phrase: str, prompt: str) -> str:
    """The prompt after the phrase; without a phrase, the prompt."""
    return f"{phrase} {prompt}" if phrase else prompt


def phrased(phrase: str, examples: Sequence[Example]) -> tuple[Example, ...]:
    """The examples with the phrase before each prompt."""
    return tuple(replace(example, prompt=with_phrase(phrase, example.prompt)) for example in examples)


def phrased_suite(phrase: str, suite: Suite) -> Suite:
    """The suite with the phrase before each prompt."""
    return Suite(**{**suite.content, "examples": phrased(phrase, suite.examples)})  # pyright: ignore[reportArgumentType]
