"""Contracts as files: a change of one is a line in a diff. `ADAPTORY_SNAPSHOTS=1` rewrites them for review."""

import difflib
import os
from pathlib import Path

REWRITE = os.environ.get("ADAPTORY_SNAPSHOTS") == "1"


def check(name: str, text: str) -> None:
    """Compares `found` with the file `name`, a path from this folder, or writes it."""
    path = (Path(__file__).parent / name).resolve()
    text = text.rstrip("\n") + "\n"
    if REWRITE:
        path.write_text(text, encoding="utf-8")
    expected = path.read_text(encoding="utf-8")
    lines = difflib.unified_diff(expected.splitlines(), text.splitlines(), name, "now", lineterm="", n=2)
    assert text == expected, "\n".join(
        ["the contract has changed; `ADAPTORY_SNAPSHOTS=1 python -m pytest tests/wire` writes it anew:", *lines]
    )
