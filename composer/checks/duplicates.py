"""The same adapter twice, by its tensors: a copy under another name counts twice in a sum."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from composer.findings import Finding, Severity
from composer.formats.adapters.layouts import WEIGHTS_FILE
from composer.formats.checkpoints.files import LocalFile
from composer.formats.checkpoints.header import read_header
from composer.formats.checkpoints.tying import same_bytes

CODE = "same_adapter"


def same_adapters(adapters: Sequence[tuple[str, Path]]) -> list[Finding]:
    """A warning for each pair of adapters, each with its name and directory, that have the same tensors. Reads headers
    first, then tensors until the first difference."""
    findings: list[Finding] = []
    for (name, directory), (other, other_directory) in combinations(adapters, 2):
        if _same(directory / WEIGHTS_FILE, other_directory / WEIGHTS_FILE):
            both = f"{name} is given twice" if name == other else f"{name} and {other} have the same tensors"
            message = f"{both}: this adapter takes part with the sum of the weights."
            findings.append(Finding(CODE, Severity.WARNING, f"{name} + {other}", message))
    return findings


def _same(one: Path, other: Path) -> bool:
    if one.resolve() == other.resolve():
        return True
    mine, theirs = read_header(one).tensors, read_header(other).tensors
    if mine.keys() != theirs.keys() or any(entry.spec != theirs[name].spec for name, entry in mine.items()):
        return False
    file, other_file = LocalFile(one), LocalFile(other)
    return all(same_bytes((file, entry), (other_file, theirs[name])) for name, entry in mine.items())
