"""Tables and fences of Markdown."""

import re
from collections.abc import Iterable, Sequence
from html import escape


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, or nothing if it has no rows. Cells are one line; `|` in them is text."""
    lines = [f"| {' | '.join(map(_cell, row))} |".replace("|  |", "| |") for row in rows]
    if not lines:
        return ""
    return "\n".join([f"| {' | '.join(head)} |".replace("|  |", "| |"), "|" + "---|" * len(head), *lines, ""]) + "\n"


def _cell(text: str) -> str:
    """Within code, readers of Markdown disagree about an escaped `|`, and none about HTML."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(_html(part[1:-1]) if "|" in part and part[0] == "`" else part.replace("|", r"\|") for part in parts)


def _html(text: str) -> str:
    return f"<code>{escape(text, quote=False).replace('|', '&#124;')}</code>"


def joined(*parts: str) -> str:
    """A page of its parts, with one empty line between blocks."""
    return re.sub(r"\n{3,}", "\n\n", "".join(parts))


def code(text: str) -> str:
    return f"`{text}`" if text else ""


def plain(text: str) -> str:
    """Escapes text written for a terminal: characters that Markdown would read as tags or emphasis are kept."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([<*_])", r"\\\1", part) for part in parts)


def fence(text: str, language: str = "") -> str:
    return f"```{language}\n{text.rstrip()}\n```\n"
