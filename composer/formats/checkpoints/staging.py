"""Results appear complete or not at all: written to a staging directory, synced, renamed."""

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from composer.errors import Interrupted, RefusedOutput

NOTE_FILE = "adaptory.json"
ADAPTER_FILE = "adapter_config.json"
"""Of an adapter. Beside a model it makes transformers apply that adapter, so no checkpoint has it."""
_STAGING = ".partial-"
_KEY = r"(?:[0-9a-f]{8}|[0-9a-f]{12})"  # by chance, or a plan's
_UNIX_BLOCK_BYTES = 512
_SYNC_THREADS = 8
_TOO_LARGE = "A file is larger than the file system, or a limit of this process, allows"
DISK_FULL_ERRNOS = {
    errno.ENOSPC: "The disk is full",
    errno.EDQUOT: "The disk quota is used up",
    errno.EFBIG: _TOO_LARGE,
}
"""The errno values of an OSError that mean a full disk, in words."""


@contextmanager
def staged_directory(out_dir: Path, size_bytes: int, key: str | None = None) -> Generator[Path]:
    """Yields a directory beside `out_dir` for about `size_bytes` of files; it is synced and renamed when the block ends
    without an error.

    Raises RefusedOutput if `out_dir` exists, its parent does not, another process is writing the same, or the disk is
    full, before or while writing. When the block raises, the staging directory is removed.

    `key` identifies the content: a block that was killed or interrupted leaves its directory, and the next one with the
    same key gets it back, with everything in it. Such directories of other keys are removed, unless in use. Keys have
    12 hexadecimal digits: a directory with another name beside `out_dir` is not ours.
    """
    refuse_existing(out_dir)
    parent = out_dir.absolute().parent
    if not parent.is_dir():
        raise RefusedOutput("no_parent", f"{parent} is not a directory.", subject=str(parent))
    staging = parent / f"{out_dir.name}{_STAGING}{key or secrets.token_hex(4)}"
    with _held(staging, out_dir):
        try:
            _remove_abandoned(out_dir, staging)
            # A begun file has its full size from the start, and occupies only what was written.
            there = sum(file.stat().st_blocks * _UNIX_BLOCK_BYTES for file in staging.iterdir())
            if shutil.disk_usage(parent).free + there < size_bytes:
                raise _no_room(errno.ENOSPC, out_dir, size_bytes)
            yield staging
            _finish(staging, out_dir)
        except BaseException as error:
            # Interrupted work can be resumed; an error would only happen again.
            again = isinstance(error, Exception) and not isinstance(error, Interrupted)
            if staging.exists() and (key is None or again):
                shutil.rmtree(staging)
            elif staging.exists():
                error.add_note(f"finished parts are in {staging}; the same command resumes from them")
            if isinstance(error, OSError) and error.errno in DISK_FULL_ERRNOS:
                raise _no_room(error.errno, out_dir, size_bytes) from error
            raise


def _finish(staging: Path, out_dir: Path) -> None:
    # Together, since the file system's journal commits them together: one after another cost 4 ms a file.
    with ThreadPoolExecutor(_SYNC_THREADS, "sync") as pool:
        list(pool.map(sync, list(staging.iterdir())))
    sync(staging)
    try:
        staging.rename(out_dir)
    except OSError:
        refuse_existing(out_dir)  # another process has finished first
        raise
    sync(out_dir.absolute().parent)


@contextmanager
def _held(staging: Path, out_dir: Path) -> Generator[None]:
    """Makes the directory, and locks it against other processes; the kernel releases the lock when this process
    dies.
    """
    try:
        if staging.is_symlink():  # its target is not ours
            raise FileExistsError(errno.EEXIST, "a link has the name of the staging directory", str(staging))
        staging.mkdir(exist_ok=True)
    except OSError as error:
        if error.errno in DISK_FULL_ERRNOS:
            raise
        parent = str(staging.parent)
        message = f"Nothing can be written to {parent}: {error.strerror}."
        raise RefusedOutput("not_writable", message, subject=parent) from error
    handle = os.open(staging, os.O_RDONLY)
    try:
        if not _locked(handle):
            message = f"Another process is writing {out_dir} now."
            raise RefusedOutput("busy", message, subject=str(out_dir), next_step="Wait for it to end.")
        # Between the check and the lock it may have finished and been renamed.
        if not staging.is_dir() or not os.path.samestat(os.fstat(handle), staging.stat()):
            refuse_existing(out_dir)
            raise RefusedOutput("busy", f"Another process wrote {out_dir} meanwhile.", subject=str(out_dir))
        yield
    finally:
        os.close(handle)


def _locked(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove_abandoned(out_dir: Path, staging: Path) -> None:
    """Removes staging directories that a killed process left for the same output: their locks are free."""
    ours = re.compile(re.escape(f"{out_dir.name}{_STAGING}") + _KEY)
    for other in staging.parent.iterdir():
        if other == staging or not ours.fullmatch(other.name) or other.is_symlink() or not other.is_dir():
            continue
        handle = os.open(other, os.O_RDONLY)
        try:
            if _locked(handle):
                shutil.rmtree(other)
        finally:
            os.close(handle)


def refuse_existing(out_dir: Path) -> None:
    if out_dir.exists() or out_dir.is_symlink():
        raise RefusedOutput("exists", f"{out_dir} exists.", subject=str(out_dir))


def sync(path: Path) -> None:
    """Syncs a file or directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes indented UTF-8 JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _no_room(why: int, out_dir: Path, size_bytes: int) -> RefusedOutput:
    free = shutil.disk_usage(out_dir.absolute().parent).free
    there_is = (
        f", and {free / 1e6:.0f} MB are free" if why == errno.ENOSPC else ""
    )  # a quota is not visible in the disk's free space
    message = f"{DISK_FULL_ERRNOS[why]}: {out_dir} needs about {size_bytes / 1e6:.0f} MB{there_is}."
    return RefusedOutput("disk_full", message, subject=str(out_dir))
