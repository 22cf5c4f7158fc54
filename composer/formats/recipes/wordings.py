"""Prompts in other words: sentences around a user's text, which should change no answer.

A combination that answers its suites may answer little once a sentence is put before the prompt: a pair that kept 24
of 24 answers kept 3 of 12 in other words. Only chat suites are reworded: a prefix of code or SQL that is to be
completed means something else with a sentence around it.
"""

from dataclasses import replace

from composer.formats.recipes.suite import Example, Suite

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
