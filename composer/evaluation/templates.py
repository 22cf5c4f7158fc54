"""Runs chat templates under a budget: they are programs, and come with bases from anyone."""

import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from functools import wraps
from types import FrameType
from typing import Any

from composer.errors import InvalidFile

STEPS = 3_000_000
"""Lines of Python that one rendering may run, two seconds' worth. Compiling a template of 10 kB takes some 100,000,
and rendering it 1,000."""
SECONDS = 20.0
"""A single line may take long too: a filter over a long list."""
_CLOCK_STEPS = 100


def with_budget(tokenizer: Any, base: str) -> Any:
    """The tokenizer of the base, whose `apply_chat_template` raises InvalidFile for a template that goes beyond the
    budget or fails. Other templates render as in transformers."""
    from jinja2 import TemplateError

    render = tokenizer.apply_chat_template

    @wraps(render)
    def rendered(*given: Any, **options: Any) -> Any:
        try:
            with _budget(base):
                return render(*given, **options)
        except RecursionError as error:  # it calls itself, or is nested too deeply to be compiled
            raise _endless(base) from error
        except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise _failed(base, error) from error

    tokenizer.apply_chat_template = rendered
    return tokenizer


@contextmanager
def _budget(base: str) -> Generator[None]:
    """Counts the lines that this thread runs in the block. Jinja's sandbox bounds a range, and not loops in loops."""
    steps, ends_at = 0, time.monotonic() + SECONDS

    def count(_frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal steps
        if event == "line":
            steps += 1
            if steps > STEPS or (steps % _CLOCK_STEPS == 0 and time.monotonic() > ends_at):
                raise _endless(base)
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        yield
    finally:
        sys.settrace(before)


def _failed(base: str, error: Exception) -> InvalidFile:
    """An error raised by the template itself, or by its expressions."""
    said = "".join(character if character.isprintable() else " " for character in str(error)[:300])
    return InvalidFile(
        "chat_template_failed",
        f"The chat template of the base {base} fails: {type(error).__name__}: {said}",
        subject="chat_template",
    )


def _endless(base: str) -> InvalidFile:
    return InvalidFile(
        "chat_template_endless",
        f"The chat template of the base {base} takes too many steps for one prompt.",
        subject="chat_template",
    )
