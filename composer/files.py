"""Files that somebody was told to read, of a size that is bounded."""

import stat
from pathlib import Path

from composer.errors import InvalidFile


def refuse_endless(path: Path) -> None:
    """Raises InvalidFile for a pipe, a device or a directory, and OSError for what is not there. To be asked before it
    is opened: that waits for a pipe's other end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise _unreadable(path, "it is no regular file")


def read_bytes(path: Path, most_bytes: int) -> bytes:
    """All of a regular file, or of one that a link leads to. Raises InvalidFile, which names it, for any other, for one
    that cannot be read, and for one of more bytes."""
    try:
        refuse_endless(path)
    except OSError as error:
        raise _unreadable(path, str(error.strerror)) from error
    return _bounded(path, most_bytes)


def read_text(path: Path, most_bytes: int) -> str:
    """The text of a file that a user has named; a pipe is one too (a shell's `<(...)`). Raises InvalidFile as
    `read_bytes`, and for what is no UTF-8."""
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
    except OSError as error:
        raise _unreadable(path, str(error.strerror)) from error
    if len(content) > most_bytes:
        message = f"{path} is larger than the {most_bytes:,} bytes allowed."
        raise InvalidFile("too_large", message, subject=str(path), next_step="Name a smaller file, or split it.")
    return content


def _unreadable(path: Path, why: str) -> InvalidFile:
    message, next_step = f"{path} cannot be read: {why}.", "Name a file that is there and may be read."
    return InvalidFile("unreadable", message, subject=str(path), next_step=next_step)
