"""Reads files of releases from the store, each verified by its digest, and the scores that they report."""

import hashlib
import io
from collections.abc import Sequence
from typing import IO

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
from registry.errors import Unavailable
from registry.formats.manifest import ManifestFile
from registry.storage.blobs import OpensBlobs
from registry.transfer.resources import Resources

_BLOCK_BYTES = 1 << 20


def read_verified(store: OpensBlobs, file: ManifestFile) -> bytes:
    """A small file of a release. Raises Unavailable if its bytes are not those of its digest, also when read again."""
    content = io.BytesIO()
    copy_verified(store, file, content)
    return content.getvalue()


def copy_verified(store: OpensBlobs, file: ManifestFile, copy: IO[bytes] | None) -> None:
    """Copies the file, reading twice if needed: one wrong read may be the network's or the memory's fault. With None,
    only verifies it."""
    for _ in range(2):
        digest = hashlib.sha256()
        if copy is not None:
            copy.seek(0)
            copy.truncate()
        with store.open(file.sha256) as source:
            while block := source.read(_BLOCK_BYTES):
                digest.update(block)
                if copy is not None:
                    copy.write(block)
        if digest.hexdigest() == file.sha256:
            return
    raise Unavailable(
        "blob_corrupt",
        f"The stored bytes of {file.path} are damaged ({file.sha256[:12]}).",
        subject=file.path,
        next_step="Ask the registry's operators to run `adaptory fsck --full --discard`; then push the file again.",
    )


_VERIFIED_BYTES = 16 << 20
"""The maximum size of a card that is read completely and verified by its digest."""


def read_reported(resources: Resources, files: Sequence[ManifestFile]) -> tuple[list[ReportedScore], list[Finding]]:
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
