"""Text and values that strangers wrote, made safe to keep and to name in a message."""

import re
import reprlib
from typing import Any

# JSON and YAML escapes can spell half a surrogate pair, which no encoding, database or tokenizer takes.
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_SHOWN_INT = 10**20


def shown(value: object) -> str:
    """`value` in at most a few dozen printable characters: cut when it is simple, its type's name otherwise.

    A few lines of YAML aliases have a repr of gigabytes, and an integer of 5000 digits has none.
    """
    simple = value is None or isinstance(value, str | float | bool)
    if simple or (isinstance(value, int) and abs(value) < _SHOWN_INT):
        return reprlib.repr(value)
    return f"a value of type {type(value).__name__}"


def has_more_values(content: bytes, most: int) -> bool:
    """Would JSON build more values of it? As objects they take thirty times their text, so that bytes are no bound."""
    return sum(map(content.count, (b",", b"[", b"{"))) > most


class Twice(ValueError):
    """A key that a JSON object has twice: what reads it takes one of the two, and not everybody the same."""


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`json.loads`' `object_pairs_hook`. Raises Twice, which says what is there twice."""
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise Twice(f"names {twice[:80]!r} twice")
    return table


def cut(text: str, most: int = 24) -> str:
    """At most so many characters: of a longer text the middle is left out, since names differ at their ends."""
    if len(text) <= most:
        return text
    front = (most - 1) // 2
    return f"{text[:front]}…{text[front + 1 - most :]}"
