"""What a page of the documentation asks its reader to do, in order.

- `console`: commands, each behind `$ ` (a line that ends in `\\` goes on), and below each what it prints;
  `(exit code 1)` ends what a failing one prints
- any language with `title="policy.yaml"`: a file to write
- any language with `title="not run by the tests: …"`: what the tests leave out, and why
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

NOT_RUN = "not run by the tests: "
_FENCE = re.compile(r"^```(\w*)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_EXIT = re.compile(r"\(exit code (\d+)\)")


@dataclass(frozen=True)
class File:
    """A file on the page, which its reader writes."""

    name: str
    text: str


@dataclass(frozen=True)
class Command:
    """A command, the lines of its output on the page, and its exit code."""

    line: str
    shown: tuple[str, ...]
    code: int = 0


@dataclass(frozen=True)
class LeftOut:
    """A step that only a reader runs."""

    text: str
    reason: str


Step = File | Command | LeftOut


def steps(page: Path) -> Iterator[Step]:
    """Raises AssertionError for a fence that is neither commands nor a file: readers would not know its purpose."""
    for language, title, text in _FENCE.findall(page.read_text(encoding="utf-8")):
        if title.startswith(NOT_RUN):
            yield LeftOut(text, title.removeprefix(NOT_RUN))
        elif language == "console":
            assert text.startswith("$ "), f"{page.name}: a console that does not begin with a command:\n{text}"
            yield from _commands(text)
        else:
            assert title, f"{page.name}: a fence of {language or 'no language'} without a file name:\n{text}"
            yield File(title, text)


def _commands(text: str) -> Iterator[Command]:
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        lines = part.splitlines()
        end = next(number for number, line in enumerate(lines) if not line.endswith("\\"))
        shown = [line for line in lines[end + 1 :] if line.strip()]
        code = _EXIT.fullmatch(shown[-1]) if shown else None
        yield Command(
            "\n".join(lines[: end + 1]), tuple(shown[:-1] if code else shown), int(code.group(1)) if code else 0
        )


_MASKS = (
    (re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)?"), "TIME"),
    (re.compile(r"\b(?=[a-f]*\d)[0-9a-f]{12,64}\b"), "HEX"),
    (re.compile(r"\b\d[\d,]*(\.\d+)? ?([kMG]i?)?B\b"), "SIZE"),
    (re.compile(r"(?<![\w.])\d+\.\d+(?![\w.])|(?<![\w.:])\d{1,3}(,\d{3})+(?![\w.])"), "N"),
    (re.compile(r"adp_\w+"), "TOKEN"),
    (re.compile(r"\s+"), " "),
)


def masked(line: str) -> str:
    """The line without parts that differ between runs: times, digests, sizes, measured numbers, and spacing."""
    for pattern, word in _MASKS:
        line = pattern.sub(word, line)
    return line.strip()


def missing(shown: tuple[str, ...], printed: str) -> list[str]:
    """The shown lines that were not printed, in this order. `…` stands for any text within a line."""
    lines = [masked(line) for line in printed.splitlines()]
    left: list[str] = []
    for line in shown:
        pattern = re.compile(".*".join(map(re.escape, masked(line).split("…"))))
        at = next((number for number, printed in enumerate(lines) if pattern.fullmatch(printed)), None)
        if at is None:
            left.append(line)
        else:
            del lines[: at + 1]
    return left
