"""Untrusted text, values and files: bounded before they are read, and safe to keep and to print."""

import re
import reprlib
import stat
from pathlib import Path
from typing import Any

from composer.errors import InvalidFile

# JSON and YAML escapes can spell an unpaired surrogate, which no encoding, database or tokenizer accepts.
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_SHOWN_INT = 10**20
MAX_TEXT, MAX_ITEMS, MAX_HYPERPARAMETERS = 1_000, 100, 200
"""Limits of a release's provenance: characters of a text, items of a list, hyperparameters."""
MAX_EXAMPLES = 100_000
"""Maximum examples of a suite."""


def printable(value: object) -> str:
    """`value` in at most a few dozen printable characters: shortened if it is simple, otherwise its type's name. A few
    lines of YAML aliases have a repr of gigabytes, and an integer of 5000 digits has none."""
    simple = value is None or isinstance(value, str | float | bool)
    if simple or (isinstance(value, int) and abs(value) < _SHOWN_INT):
        return reprlib.repr(value)
    return f"a value of type {type(value).__name__}"


def has_more_values(content: bytes, most: int) -> bool:
    """Whether parsing the JSON would create more values than the limit. Objects take thirty times the memory of their
    text, so a limit on
    bytes is not enough."""
    return sum(map(content.count, (b",", b"[", b"{"))) > most


class DuplicateKey(ValueError):
    """A duplicate key of a JSON object: readers use one of the two values, but not all the same one."""


def reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`json.loads`' `object_pairs_hook`. Raises DuplicateKey, which names the key."""
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise DuplicateKey(f"names {twice[:80]!r} twice")
    return table


def cut(text: str, most: int = 24) -> str:
    """Shortens a text to at most `most` characters, in the middle, since names differ at their ends."""
    if len(text) <= most:
        return text
    front = (most - 1) // 2
    return f"{text[:front]}…{text[front + 1 - most :]}"


def refuse_endless(path: Path) -> None:
    """Raises InvalidFile for a pipe, a device or a directory, and OSError for a missing file. To be called before
    opening it: opening a pipe waits for its other end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise _unreadable(path, "it is not a regular file")


def read_bytes(path: Path, most_bytes: int) -> bytes:
    """The content of a regular file, or of one that a link leads to. Raises InvalidFile, which names it, for any other,
    an unreadable or a larger one."""
    try:
        refuse_endless(path)
    except OSError as error:
        raise _unreadable(path, str(error.strerror)) from error
    return _bounded(path, most_bytes)


def read_text(path: Path, most_bytes: int) -> str:
    """The text of a file that a user named, or of a pipe (a shell's `<(...)`). Raises InvalidFile like `read_bytes`,
    and for text that is not UTF-8."""
    content = _bounded(path, most_bytes)
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise _unreadable(path, f"line {line} is not UTF-8, from byte {error.start} on") from error


def _bounded(path: Path, most_bytes: int) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(most_bytes + 1)
    except IsADirectoryError as error:
        raise _unreadable(path, "it is a directory", "Name a file in it.") from error
    except OSError as error:
        raise _unreadable(path, str(error.strerror)) from error
    if len(content) > most_bytes:
        message = f"{path} is larger than the {most_bytes:,} bytes allowed."
        raise InvalidFile("too_large", message, subject=str(path))
    return content


def _unreadable(path: Path, why: str, step: str = "Name a file that exists and that you may read.") -> InvalidFile:
    return InvalidFile("unreadable", f"{path} cannot be read: {why}.", subject=str(path), next_step=step)
