"""This machine's shared cache of pulled files, by SHA-256.

A file in a pulled directory is a hard link to its entry, so it needs no extra space. It is read-only: writing to it
would change every directory that links it. Entries are hashed on every use (1 to 2 GB/s), since root or a failing disk
can still change them; damaged ones are removed and fetched again.
"""

import errno
import os
import shutil
import stat
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from composer.formats.checkpoints.hashing import hash_file
from registry.environment.home import close_directory
from registry.errors import NO_SPACE
from registry.formats.references import parse_digest


@dataclass(frozen=True, slots=True)
class BlobCache:
    """Entries are `directory/<sha256>`. Safe for concurrent processes. Raises Usage for an invalid SHA-256."""

    directory: Path

    def take(self, sha256: str, target: Path) -> bool:
        """Links the entry to `target`, or copies it to another file system; False if there is no valid entry."""
        entry = self._entry(sha256)
        if not is_regular(entry):
            return False
        staging = self.directory / f".{uuid.uuid4().hex}"
        try:
            # Via a staging file: `target` may hold a partial download, which must survive if the entry is damaged.
            _link_or_copy(entry, staging)
            if hash_file(staging) == sha256:
                return _moved(staging, target, sha256)
        except FileNotFoundError:
            return False
        finally:
            staging.unlink(missing_ok=True)
        entry.unlink(missing_ok=True)
        return False

    def keep(self, sha256: str, source: Path) -> None:
        """Caches the just verified `source` and makes it read-only. Does nothing if the disk is full: the caller has
        the file already, and the next pull fetches it again."""
        entry = self._entry(sha256)
        if is_regular(entry):
            return
        close_directory(self.directory)
        staging = self.directory / f".{uuid.uuid4().hex}"
        source.chmod(0o444)
        try:
            _link_or_copy(source, staging)
            with suppress(IsADirectoryError):  # a directory is in the way: do without
                staging.replace(entry)
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
        finally:
            staging.unlink(missing_ok=True)

    def _entry(self, sha256: str) -> Path:
        return self.directory / parse_digest(sha256)  # the digest is untrusted: with "/" it could be any path


def is_regular(path: Path) -> bool:
    """Checks that the path is a regular file: not a link, which no release has, nor a pipe, which would block."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        return False


def _moved(source: Path, target: Path, sha256: str) -> bool:
    """Moves the file; to another file system, copies it and verifies the copy."""
    try:
        source.replace(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        target.unlink(missing_ok=True)
        shutil.copyfile(source, target)
        return hash_file(target) == sha256
    return True


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # another file system, one without links, or too many of them
        shutil.copyfile(source, target)
