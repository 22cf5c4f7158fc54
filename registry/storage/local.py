"""Blobs in a directory: written to a staging file, synced, then renamed into place."""

import hashlib
import shutil
from collections.abc import Collection, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import BinaryIO

from composer.formats.checkpoints.files import StoredFile
from composer.formats.checkpoints.staging import sync
from registry.environment.home import close_directory
from registry.errors import NO_SPACE, Unavailable
from registry.formats.references import Digest
from registry.storage.blobs import MAX_RESULT_BYTES, WORK, BlobStat, Reader, blob_key, blob_missing


class LocalStore:
    """One read-only file per blob. Files being written are in `incoming/` on the same file system."""

    arrivals = None
    """A directory has no address, so bytes come through the API."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.incoming = directory / "incoming"
        if not directory.exists():
            close_directory(directory)
        self.incoming.mkdir(exist_ok=True)

    def path(self, sha256: Digest) -> Path:
        return self.directory / blob_key(sha256)

    def stat(self, sha256: Digest) -> BlobStat | None:
        try:
            return _stat(sha256, self.path(sha256))
        except FileNotFoundError:
            return None

    def open(self, sha256: Digest, start: int = 0, length: int | None = None) -> Reader:
        try:
            file = self.path(sha256).open("rb")
        except FileNotFoundError:
            raise blob_missing(sha256) from None
        file.seek(start)
        return file if length is None else _BoundedFile(file, length)

    def put(self, sha256: Digest, source: Path, *, move: bool = False) -> BlobStat:
        target = self.path(sha256)
        with self.translate_disk_errors():
            if target.exists() and target.stat().st_size == source.stat().st_size:
                if move:
                    source.unlink()
                return _stat(sha256, target)
            staged = self._stage(source, move=move)
            try:
                staged.chmod(0o444)
                _make_directory(target.parent)
                stat = _stat(sha256, staged)
                staged.replace(target)
                sync(target.parent)
            finally:
                staged.unlink(missing_ok=True)
            return stat

    def begin_write(self, size_bytes: int) -> "LocalWriter":
        del size_bytes
        with self.translate_disk_errors():
            return LocalWriter(self)

    def _stage(self, source: Path, *, move: bool) -> Path:
        """Makes a synced file of our own in `incoming/` with the bytes of `source`."""
        with NamedTemporaryFile(dir=self.incoming, delete=False) as file:
            staged = Path(file.name)
        try:
            if move and source.stat().st_dev == self.incoming.stat().st_dev:
                source.replace(staged)
            else:
                shutil.copyfile(source, staged)
            sync(staged)
        except BaseException:
            staged.unlink(missing_ok=True)
            raise
        return staged

    @contextmanager
    def translate_disk_errors(self) -> Generator[None]:
        try:
            yield
        except OSError as error:
            raise unwritable("The blob store", str(self.directory), error) from error

    def url(self, sha256: Digest, expires_s: int, disposition: str | None = None) -> str | None:
        del sha256, expires_s, disposition  # a directory has no address; the API streams blobs
        return None

    def delete(self, sha256: Digest) -> None:
        self.path(sha256).unlink(missing_ok=True)

    def iterate(self) -> Iterator[BlobStat]:
        for path in sorted((self.directory / "blobs" / "sha256").glob("??/*")):
            stat = self.stat(Digest(path.name))
            if stat is not None:
                yield stat

    def unit_results(self) -> "LocalResults":
        return LocalResults(self.directory)

    def sweep(self, before: datetime, keep: Collection[str]) -> int:
        del keep  # an upload is a single request here
        return remove_stale(self.incoming.iterdir(), before)


class LocalWriter:
    """A file in `incoming/` on its way to becoming a blob."""

    copied_bytes = 0

    def __init__(self, store: LocalStore) -> None:
        self._store = store
        with NamedTemporaryFile(dir=store.incoming, delete=False) as file:
            self._path = Path(file.name)
        self._file = self._path.open("wb", buffering=0)

    def write(self, block: memoryview, source: StoredFile | None = None, offset: int = 0) -> None:
        del source, offset
        with self._store.translate_disk_errors():
            while block.nbytes:
                block = block[self._file.write(block) :]

    def finish(self, sha256: Digest) -> BlobStat:
        self._file.close()
        return self._store.put(sha256, self._path, move=True)

    def abort(self) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)


class LocalResults:
    """One file per result, which every process of the host, or of a shared file system, can read."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory / WORK

    def read(self, key: str) -> bytes | None:
        try:
            with self._path(key).open("rb") as file:
                return file.read(MAX_RESULT_BYTES)
        except FileNotFoundError:
            return None

    def write(self, key: str, content: bytes) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=self._directory, prefix=".", delete=False) as file:
            staged = Path(file.name)
        try:
            staged.write_bytes(content)
            sync(staged)
            staged.replace(self._path(key))
        finally:
            staged.unlink(missing_ok=True)

    def delete(self, key: str) -> None:
        self._path(key).unlink(missing_ok=True)

    def sweep(self, before: datetime) -> int:
        return remove_stale(self._directory.glob("*"), before)

    def _path(self, key: str) -> Path:
        return self._directory / f"{key}.json"


def unwritable(what: str, subject: str, error: OSError) -> Unavailable:
    """The error for a failed write; its next step distinguishes a full disk from an unwritable or broken one."""
    full = error.errno in NO_SPACE
    return Unavailable(
        "store_full" if full else "store_unavailable",
        f"{what} cannot be written: {error.strerror}.",
        subject=subject,
        next_step="Free some space and repeat."
        if full
        else "Check on the server that the directory is writable and the disk is sound, then repeat.",
    )


def write_hashed(path: Path, pieces: Iterable[bytes], what: str, subject: str) -> tuple[Digest, int]:
    """Writes a file, and returns its sha256 and its size in bytes. Raises what `pieces` raise, and `unwritable` with
    `what` and `subject` for an error of the disk."""
    digest, size_bytes = hashlib.sha256(), 0
    try:
        with path.open("wb") as file:
            for piece in pieces:
                digest.update(piece)
                size_bytes += len(piece)
                file.write(piece)
    except OSError as error:
        raise unwritable(what, subject, error) from error
    return Digest(digest.hexdigest()), size_bytes


def remove_stale(paths: Iterable[Path], before: datetime) -> int:
    """Removes files and directories last written before that time; their owners may still be running. Returns their
    number."""
    removed = 0
    for path in paths:
        with suppress(FileNotFoundError):  # its owner has finished with it
            if path.stat().st_mtime < before.timestamp():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                removed += 1
    return removed


class _BoundedFile(Reader):
    """A binary file that ends after `length` bytes; has only what readers of a blob call."""

    def __init__(self, file: BinaryIO, length: int) -> None:
        self._file = file
        self._left = length

    def read(self, size: int = -1, /) -> bytes:
        data = self._file.read(self._left if size < 0 else min(size, self._left))
        self._left -= len(data)
        return data

    def close(self) -> None:
        self._file.close()


def _stat(sha256: Digest, path: Path) -> BlobStat:
    status = path.stat()
    return BlobStat(sha256, status.st_size, datetime.fromtimestamp(status.st_mtime, UTC))


def _make_directory(directory: Path) -> None:
    """Syncs the parent directory if this one is new: a crash could otherwise lose it with every blob in it."""
    if directory.is_dir():
        return
    _make_directory(directory.parent)
    directory.mkdir(exist_ok=True)
    sync(directory.parent)
