"""Every figure in the README and in the comparison with other tools was measured, in the row that it names."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
NAMED = re.compile(r"\[((?:`[^`]+`(?:, )?)+)\](?!\()")
"""`section` or `section`, `row` in brackets: the section by the beginning of its heading, the row by its first cell."""
FIGURE = re.compile(r"(?<![\w.@/-])-?\d[\d,]*(?:\.\d+)?(?![\w/]|\.\d)")
NOT_MEASURED = re.compile(
    r"`[^`]*`|\]\([^)]*\)|PEFT \d[\d.]*|\d+M\b|base of 2\.2 GB|2\.2 GB|273 MB|page of 50|10,000 versions|top \d+|95 %"
)
"""Names, addresses, versions of tools, and the sizes of the measured models."""


def claims(page: Path, start: str, end: str = "\\Z") -> Iterator[tuple[str, str, list[str]]]:
    """The words before each pair of brackets, starting at the end of the previous pair, with the section and the rows
    that the brackets name; finally the rest of a paragraph, without a section."""
    [part] = re.findall(rf"{start}.*?(?={end})", page.read_text(encoding="utf-8"), re.DOTALL)
    for block in re.split(r"\n\n|\n(?=[-|])", part):
        before = 0
        for match in NAMED.finditer(block):
            section, *rows = re.findall(r"`([^`]+)`", match[1])
            until = block.index("\n", match.end()) if block.startswith("|") and "\n" in block[match.end() :] else None
            words = block[before : match.start()] + (block[match.end() : until] if block.startswith("|") else "")
            yield words, section, rows
            before = len(block) if block.startswith("|") else match.end()
        yield block[before:], "", []


def figures(words: str) -> list[str]:
    return [figure.replace(",", "") for figure in FIGURE.findall(NOT_MEASURED.sub(" ", words))]


@pytest.mark.parametrize(
    ("name", "start", "end"), [("README.md", "## Measured", "\\n## "), ("docs/comparison.md", "# Comparison", "\\Z")]
)
def test_every_figure_is_in_the_row_of_the_results_that_it_names(name: str, start: str, end: str) -> None:
    checked = 0
    for words, section, rows in claims(ROOT / name, start, end):
        if not section:
            assert figures(words) == [], f"{name}: no section is named behind {words.strip()!r}"
            continue
        measured = _measured(section, rows)
        for figure in figures(words):
            assert figure in measured, f"{name}: {figure} is not in {section}, {rows}: {words.strip()!r}"
            checked += 1
    assert checked > 10


def _measured(section: str, rows: list[str]) -> set[str]:
    """The numbers of the rows of a section; of the section if it names none."""
    [text] = re.findall(rf"^##+ {re.escape(section)}[^\n]*\n.*?(?=^## |\Z)", RESULTS, re.MULTILINE | re.DOTALL)
    if rows:
        lines = [line for line in text.splitlines() if line.startswith("|") and line.split("|")[1].strip() in rows]
        assert {line.split("|")[1].strip() for line in lines} == set(rows), f"{section} has no row {rows}"
        text = "\n".join(lines)
    return {figure.replace(",", "").removesuffix(".") for figure in re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)}


def test_a_figure_that_was_not_measured_is_noticed() -> None:
    assert "3.59" in _measured("Merge: three adapters of rank 16", [])
    assert "3.60" not in _measured("Merge: three adapters of rank 16", [])
    assert "0.92" not in _measured("What combinations keep", ["mean"])
