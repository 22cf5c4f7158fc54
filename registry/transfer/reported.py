"""Reads the scores reported in files of a release from the store, within bounds."""

from collections.abc import Sequence

from composer.findings import Finding
from composer.formats.checkpoints.card import CARD_FILE
from composer.formats.checkpoints.reported import (
    MAX_FILE_BYTES,
    MAX_FILES,
    ReportedScore,
    doubt,
    is_results_file,
    reported_scores,
)
from registry.formats.manifest import ManifestFile
from registry.transfer.resources import Resources
from registry.transfer.verified import read_verified

_VERIFIED_BYTES = 16 << 20
"""The maximum size of a card that is read completely and verified by its digest."""


def read(resources: Resources, files: Sequence[ManifestFile]) -> tuple[list[ReportedScore], list[Finding]]:
    """The scores that the README and `.eval_results/*.yaml` report, and a warning for each part that cannot be used."""
    results = [file for file in files if is_results_file(file.path)]
    doubts = [doubt(file.path, f"{file.path} is not read: only {MAX_FILES} are.") for file in results[MAX_FILES:]]
    contents: dict[str, bytes] = {}
    for file in results[:MAX_FILES]:
        if file.size_bytes > MAX_FILE_BYTES:
            doubts.append(doubt(file.path, f"{file.path} is not read: it has more than {MAX_FILE_BYTES:,} bytes."))
            continue
        contents[file.path] = read_verified(resources.store, file)
    for file in files:
        if file.path == CARD_FILE:  # a card of any length: its front matter must end within the bound
            contents[file.path] = _card(resources, file)
    scores, unusable = reported_scores(contents)
    return scores, [*doubts, *unusable]


def _card(resources: Resources, file: ManifestFile) -> bytes:
    """The card, or the beginning of one that is too long to be verified."""
    if file.size_bytes <= _VERIFIED_BYTES:
        return read_verified(resources.store, file)
    with resources.store.open(file.sha256, 0, 2 * MAX_FILE_BYTES) as source:
        return source.read()
