"""Words around a prompt: phrases that select a task, and wordings that should change no answer.

Selector phrases are a few words at the beginning of a prompt, which tell an adapter of several tasks which is meant.
Where suites have the same prompts and want different answers, no adapter serves both without them.

A combination that answers its suites may answer little once a sentence is put before the prompt: a pair that kept 24
of 24 answers kept 3 of 12 in other words. Only chat suites are reworded: a prefix of code or SQL that is to be
completed means something else with a sentence around it.
"""

from collections.abc import Sequence
from dataclasses import replace

from composer.formats.recipes.suite import Example, Suite

MAX_PHRASE_CHARS = 100


def problem_of_phrase(phrase: str) -> str:
    """The reason why a text cannot be a phrase; empty if it can."""
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


def fit_without_phrase(adapter: str, suite: str, phrase: str) -> str:
    """The reason why an adapter that answers its suite only after a phrase cannot be fitted: a fit or a search would
    run it without."""
    return f"{adapter} answers {suite} after the phrase “{phrase}”, and the fit would leave it out."


FITTING = (
    ("Please answer this one.\n\n", ""),
    ("", "\n\nThat would help me a lot."),
    ("Hi, a quick question from my side: ", " Thanks!"),
    ("I am working on this:\n", "\nWhat do you answer?"),
)
"""What is put before and after some of the prompts that a fit is made on: never what judges it."""


def half_reworded(examples: Sequence[Example]) -> tuple[Example, ...]:
    """The examples; every second one has the next of FITTING around its prompt."""
    made = list(examples)
    for number, index in enumerate(range(1, len(made), 2)):
        before, after = FITTING[number % len(FITTING)]
        made[index] = replace(made[index], prompt=f"{before}{made[index].prompt}{after}")
    return tuple(made)


JUDGING = (
    ("Could you help me with this, please?\n\n", "\n\nThank you!"),
    ("I have one for you. ", " I would be glad about an answer."),
    ("Hello! Here is what I need:\n", "\nMany thanks in advance."),
    ("Please take care of the following request.\n\n", ""),
)
"""What is put before and after a prompt to judge a combination."""


def reworded(suite: Suite, examples: tuple[Example, ...]) -> Suite | None:
    """A suite of these examples, each with the next of JUDGING around its prompt. None for a suite without chat, and
    for no examples."""
    if not suite.chat or not examples:
        return None
    wrapped: list[Example] = []
    for number, example in enumerate(examples):
        before, after = JUDGING[number % len(JUDGING)]
        wrapped.append(replace(example, prompt=f"{before}{example.prompt}{after}"))
    return Suite(**{**suite.content, "examples": tuple(wrapped)})  # pyright: ignore[reportArgumentType]
