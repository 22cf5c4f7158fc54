"""Archives of backups: blobs as in a store, and documents by name."""

import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Protocol
from uuid import uuid4

from composer.formats.checkpoints.staging import sync
from registry.errors import NotFound
from registry.storage.blobs import BlobStore, Reader
from registry.storage.local import LocalStore, unwritable


class Archive(Protocol):
    """The contract of a target of backups. Errors are those of a store."""

    @property
    def blobs(self) -> BlobStore:
        """Blobs that the backups here share."""
        ...

    @property
    def scratch(self) -> Path:
        """A directory on this machine for files on their way to the archive."""
        ...

    def save(self, name: str, source: Path) -> None:
        """Keeps a copy of the file under that name, completely or not at all."""
        ...

    def open(self, name: str) -> Reader:
        """Opens a document. Raises NotFound."""
        ...

    def names(self) -> Iterator[str]:
        """Yields the name of every document, in any order."""
        ...

    def delete(self, name: str) -> None:
        """Deletes the document, if it exists."""
        ...


DOCUMENTS = "snapshots/"
"""The prefix of each document's key."""


def unknown_document(name: str) -> NotFound:
    """The error for a document that is not in the archive."""
    return NotFound("backup_missing", f"The backup has no {name}.", subject=name, next_step="Restore another backup.")


class LocalArchive:
    """Backups in a directory, which only its owner may read."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        with suppress(FileExistsError):
            directory.mkdir(parents=True, mode=0o700)
        self.blobs = LocalStore(directory)
        self.scratch = self.blobs.incoming

    def save(self, name: str, source: Path) -> None:
        target = self._path(name)
        staged = self.scratch / f"document-{uuid4().hex}"
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, staged)
            sync(staged)
            staged.replace(target)
            for directory in (target.parent, target.parent.parent, self._directory):
                sync(directory)
        except OSError as error:
            raise unwritable("The backup", str(self._directory), error) from error
        finally:
            staged.unlink(missing_ok=True)

    def open(self, name: str) -> Reader:
        try:
            return self._path(name).open("rb")
        except FileNotFoundError:
            raise unknown_document(name) from None

    def names(self) -> Iterator[str]:
        top = self._directory / DOCUMENTS
        for path in sorted(top.glob("*/*")):
            yield path.relative_to(top).as_posix()

    def delete(self, name: str) -> None:
        path = self._path(name)
        path.unlink(missing_ok=True)
        with suppress(OSError):  # skips documents outside the archive
            path.parent.rmdir()

    def _path(self, name: str) -> Path:
        return self._directory / DOCUMENTS / name
