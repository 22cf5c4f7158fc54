"""The checks of adapters and a base, which every command that joins them calls and judges alike, and of a result."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Protocol

from composer.checks.bases import contradicting_bases
from composer.errors import Mismatch
from composer.findings import Finding, Severity
from composer.formats.adapters.config.config import AdapterConfig
from composer.formats.adapters.inspection import Inspection
from composer.formats.adapters.layouts import WEIGHTS_FILE
from composer.formats.adapters.placement.missing import CODE as MISSING_MODULES
from composer.formats.adapters.placement.result import OTHER_PATHS, PlacementResult
from composer.formats.adapters.tokenizers import chosen_tokenizer
from composer.formats.checkpoints.files import LocalFile
from composer.formats.checkpoints.header import read_header
from composer.formats.checkpoints.tying import same_bytes

_OF_KEYS = {OTHER_PATHS, MISSING_MODULES, "no_prefix", "pattern_unused", "raw_keys"}
"""Findings of the placement that matter in a result too: losses, and keys that other tools read differently."""

NEW_EMBEDDINGS = ("new_embeddings.safetensors", "new_embeddings.bin")
"""Rows for new tokens in the form that vLLM once read. PEFT has them in the adapter's own file."""


class CheckedAdapter(Protocol):
    """An adapter in a check: its name for messages, its directory, its config, and its placement on the base."""

    @property
    def name(self) -> str: ...
    @property
    def path(self) -> Path: ...
    @property
    def config(self) -> AdapterConfig: ...
    @property
    def placed(self) -> PlacementResult: ...


def check(members: Sequence[CheckedAdapter], base_names: Sequence[str] = ()) -> list[Finding]:
    """The findings on these adapters together, and on a base of these names.

    contradicting_bases  they state different bases, or another one than this
    same_adapter         one takes part twice
    tokenizers_differ    an error: their tokenizers or templates do not fit into one model
    new_embeddings       rows for new tokens that nothing reads
    missing_modules, …   what their placement on the base found

    Reads their files' headers, and tensors only of adapters that may be the same.
    """
    directories = [(member.name, member.path) for member in members]
    return [
        *differing_tokenizers(directories),
        *contradicting_bases([(m.name, m.config.base_model_name_or_path) for m in members], base_names),
        *same_adapters(directories),
        *new_embeddings(directories),
        *(finding for member in members for finding in member.placed.findings if finding.code in _OF_KEYS),
    ]


def check_one(seen: Inspection, base_names: Sequence[str] = ()) -> list[Finding]:
    """The findings of an adapter's inspection, and of the check on it alone."""
    return list(dict.fromkeys([*seen.findings, *check([seen], base_names)]))


def same_adapters(adapters: Sequence[tuple[str, Path]]) -> list[Finding]:
    """A warning for each pair of adapters, each with its name and directory, that have the same tensors. Reads headers
    first, then tensors until the first difference."""
    findings: list[Finding] = []
    for (name, directory), (other, other_directory) in combinations(adapters, 2):
        if _same_tensors(directory / WEIGHTS_FILE, other_directory / WEIGHTS_FILE):
            both = f"{name} is given twice" if name == other else f"{name} and {other} have the same tensors"
            message = f"{both}: this adapter takes part with the sum of the weights."
            findings.append(Finding("same_adapter", Severity.WARNING, f"{name} + {other}", message))
    return findings


def _same_tensors(one: Path, other: Path) -> bool:
    if one.resolve() == other.resolve():
        return True
    mine, theirs = read_header(one).tensors, read_header(other).tensors
    if mine.keys() != theirs.keys() or any(entry.spec != theirs[name].spec for name, entry in mine.items()):
        return False
    file, other_file = LocalFile(one), LocalFile(other)
    return all(same_bytes((file, entry), (other_file, theirs[name])) for name, entry in mine.items())


def differing_tokenizers(adapters: Sequence[tuple[str, Path]]) -> list[Finding]:
    """An error for adapters, each with its name and directory, whose tokenizers or chat templates one model cannot
    have."""
    try:
        chosen_tokenizer(None, adapters)
    except Mismatch as error:
        return [Finding(error.code, Severity.ERROR, error.subject, error.message)]
    return []


def new_embeddings(adapters: Sequence[tuple[str, Path]]) -> Iterator[Finding]:
    """A warning for each adapter with rows of new tokens beside its file, which nothing merges or combines."""
    for name, directory in adapters:
        for file in NEW_EMBEDDINGS:
            if not (directory / file).is_file():
                continue
            tensors = read_header(directory / file).tensors if file.endswith(".safetensors") else {}
            shapes = [f"{key} {list(entry.shape)}" for key, entry in tensors.items()][:2]
            shown = f" ({', '.join(shapes)})" if shapes else ""
            message = f"{file} of {name} is ignored{shown}: PEFT has no such file."
            yield Finding("new_embeddings", Severity.WARNING, name, message)


def zero_result(method: str, names: Sequence[str]) -> Finding:
    """A warning for a combination whose every delta is zero, although its inputs are not."""
    message = f"{method} of {' and '.join(names)} adds nothing: every delta of the result is zero."
    return Finding("zero_result", Severity.WARNING, method, message)


def unchanged_result(method: str, tensors: int) -> Finding:
    """A warning for a merge whose every weight is the base's, after `tensors` were written with deltas added."""
    message = f"{method} changes nothing: all weights in the {tensors} tensors that it writes equal the base's."
    return Finding("zero_result", Severity.WARNING, method, message, 0.0)


def flushed_to_zero(counts: Mapping[str, int]) -> list[Finding]:
    """A warning for values that are not zero and are zero in float16: by tensor, the number counted over all values."""
    flushed = {name: count for name, count in counts.items() if count}
    if not flushed:
        return []
    worst = max(sorted(flushed), key=lambda name: flushed[name])  # of equal ones, the same at every run
    total = sum(flushed.values())
    message = (
        f"float16 makes {total:,} values zero, in {len(flushed)} tensors, most in {worst} ({flushed[worst]:,}): it has "
        "no number between 0 and 6e-8."
    )
    return [Finding("f16_flushed", Severity.WARNING, worst, message, float(total))]
