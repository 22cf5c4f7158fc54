"""Reads files of releases from the store, each verified by its digest."""

import hashlib
import io
from typing import IO

from registry.errors import Unavailable
from registry.formats.manifest import ManifestFile
from registry.storage.blobs import OpensBlobs

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
