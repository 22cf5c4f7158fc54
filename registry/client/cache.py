"""The shared cache of this machine: every file pulled here, once, by its sha256.

A file in a pulled directory is a hard link to its entry, so it costs no space twice, and is read-only: writing to it
would change every directory that has it. An entry is hashed each time it is used (1 to 2 GB a second), since a link
cannot keep root or a failing disk from changing it; a damaged one is removed and fetched anew.
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
from registry.errors import NO_SPACE
from registry.formats.references import parse_digest


@dataclass(frozen=True, slots=True)
class BlobCache:
    """`directory/<sha256>`. Several processes may use it at once. Raises Usage for what is no sha256."""

    directory: Path

    def take(self, sha256: str, target: Path) -> bool:
        """Links the entry to `target`, or copies it to another file system; False when there is no sound one."""
        entry = self._entry(sha256)
        if not is_regular(entry):
            return False
        aside = self.directory / f".{uuid.uuid4().hex}"
        try:
            # Aside first: what lies at `target` may be half of the file, and is all there is if the cache has none.
            _link_or_copy(entry, aside)
            if hash_file(aside) == sha256:
                return _moved(aside, target, sha256)
        except FileNotFoundError:
            return False
        finally:
            aside.unlink(missing_ok=True)
        entry.unlink(missing_ok=True)
        return False

    def keep(self, sha256: str, source: Path) -> None:
        """`source` was verified a moment ago; it is read-only from now on. A full disk keeps nothing: the next one to
        want it fetches it again, and who wants it now has it already."""
        entry = self._entry(sha256)
        if is_regular(entry):
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        aside = self.directory / f".{uuid.uuid4().hex}"
        source.chmod(0o444)
        try:
            _link_or_copy(source, aside)
            with suppress(IsADirectoryError):  # somebody put one there: it is done without
                aside.replace(entry)
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
        finally:
            aside.unlink(missing_ok=True)

    def _entry(self, sha256: str) -> Path:
        return self.directory / parse_digest(sha256)  # a digest comes from afar, and with "/" it would be any path


def is_regular(path: Path) -> bool:
    """Not so a link, whatever it leads to: no directory of a release has one. Nor a pipe, which would be waited for."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        return False


def _moved(source: Path, target: Path, sha256: str) -> bool:
    """To another file system it is copied, and what was copied is hashed."""
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
