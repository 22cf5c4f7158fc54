"""Bytes on their way into the store: what is absent, how it is sent, and that it is what it claims to be."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from sqlalchemy import select

from registry.audit import Actor
from registry.db import insert_if_absent
from registry.errors import Invalid, TooLarge, Unavailable
from registry.manifest import ManifestFile, check_path, refuse_pickle
from registry.models import Blob
from registry.names import Digest
from registry.resources import Resources


def absent(resources: Resources, files: Sequence[ManifestFile]) -> list[ManifestFile]:
    """Those files whose bytes must be sent, the store may have lost them; paths and sizes are checked first."""
    for file in files:
        check_path(file.path)
        _check_size(resources, file.path, file.size_bytes)
        refuse_pickle(file.path)
    with resources.read() as session:
        known = set(session.scalars(select(Blob.sha256).where(Blob.sha256.in_({file.sha256 for file in files}))))
    return [file for file in files if file.sha256 not in known or not _is_stored(resources, file)]


def _is_stored(resources: Resources, file: ManifestFile) -> bool:
    stat = resources.store.stat(file.sha256)
    return stat is not None and stat.size_bytes == file.size_bytes


def receive(resources: Resources, actor: Actor, sha256: Digest, chunks: Iterable[bytes], size_bytes: int) -> None:
    """Takes the bytes of one blob. Nothing appears under its digest unless digest and size are right."""
    _check_size(resources, sha256, size_bytes)
    with TemporaryDirectory(dir=resources.work_directory, prefix="upload-") as directory:
        path = Path(directory) / "blob"
        digest, taken = hashlib.sha256(), 0
        try:
            with path.open("wb") as file:
                for chunk in chunks:
                    taken += len(chunk)
                    if taken > size_bytes:
                        break
                    digest.update(chunk)
                    file.write(chunk)
        except OSError as error:
            raise Unavailable(
                "store_full",
                f"The upload cannot be written: {error.strerror}.",
                subject=sha256,
                next_step="Free some space and repeat.",
            ) from error
        if taken != size_bytes or digest.hexdigest() != sha256:
            raise Invalid(
                "digest_differs",
                f"The bytes received are not those of {sha256}.",
                subject=sha256,
                next_step="Send the file again.",
            )
        store_file(resources, actor, sha256, path, move=True)


def store_file(resources: Resources, actor: Actor, sha256: Digest, path: Path, *, move: bool) -> None:
    """Puts a verified file into the store, then its row: a crash between the two leaves an orphan, no more."""
    stat = resources.store.put(sha256, path, move=move)
    with resources.write() as session:
        insert_if_absent(session, Blob, sha256=sha256, size_bytes=stat.size_bytes, created_at=actor.at)


def _check_size(resources: Resources, subject: str, size_bytes: int) -> None:
    limit = resources.settings.max_file_bytes
    if not 0 <= size_bytes <= limit:
        raise TooLarge(
            "file_too_large",
            f"{subject} has {size_bytes:,} bytes; the limit is {limit:,}.",
            subject=subject,
            next_step="ADAPTORY_MAX_FILE_BYTES sets it.",
        )
