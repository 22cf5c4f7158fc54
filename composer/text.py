"""Text and values that strangers wrote, made safe to keep and to name in a message."""

import re
import reprlib

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
