"""Verified bytes: push sends only what is missing, pull checks every file and appears whole or not at all."""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from urllib.parse import quote

from composer.hashing import hash_file
from registry.client.api import Api, Json, line_path, release_path
from registry.errors import Conflict, Invalid, RegistryError, Unavailable
from registry.manifest import ManifestFile, check_path
from registry.names import Digest, RepositoryName

Progress = Callable[[int], None]
_BLOCK_BYTES = 1 << 20
_PARALLEL = 4


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file to be pushed, its digest known."""

    source: Path
    manifest: ManifestFile


def collect(directory: Path) -> list[LocalFile]:
    """Every file below `directory` but hidden ones, hashed. A link that leads out of it is refused, not followed."""
    if not directory.is_dir():
        raise Invalid(
            "missing_directory",
            f"{directory} is not a directory.",
            subject=str(directory),
            next_step="Name the directory that training wrote.",
        )
    home = directory.resolve()
    found: list[LocalFile] = []
    for path in sorted(directory.rglob("*")):
        relative = path.relative_to(directory)
        if any(part.startswith(".") for part in relative.parts) or path.is_dir():
            continue
        if not path.resolve().is_relative_to(home) or not path.is_file():
            raise Invalid(
                "link_outside",
                f"{relative} leads out of {directory}.",
                subject=str(relative),
                next_step="Copy the file there.",
            )
        manifest = ManifestFile(check_path(relative.as_posix()), path.stat().st_size, Digest(hash_file(path)))
        found.append(LocalFile(path, manifest))
    if not found:
        raise Invalid(
            "empty_directory",
            f"{directory} has no files.",
            subject=str(directory),
            next_step="Name the directory that training wrote.",
        )
    return found


def push(
    api: Api, files: Sequence[LocalFile], name: RepositoryName, kind: str, release: Json, progress: Progress
) -> Json:
    """Sends what the store lacks, then asks for the release. `release` is the request without its files."""
    rows: list[dict[str, Any]] = [
        {"path": file.manifest.path, "size_bytes": file.manifest.size_bytes, "sha256": file.manifest.sha256}
        for file in files
    ]
    plan = api.post("/v1/uploads", {"files": rows})
    urls = {row["sha256"]: row["url"] for row in plan["files"] if not row["present"]}
    missing = {file.manifest.sha256: file for file in files if file.manifest.sha256 in urls}
    progress(sum(file.manifest.size_bytes for file in files if file.manifest.sha256 not in missing))

    def send(file: LocalFile) -> None:
        api.put_bytes(urls[file.manifest.sha256], _chunks(file.source, progress), file.manifest.size_bytes)

    with ThreadPoolExecutor(_PARALLEL, "push") as pool:
        list(pool.map(send, missing.values()))
    return api.post(f"{line_path(name, kind)}/releases", {**release, "files": rows})


def pull(api: Api, release: Json, target: Path, progress: Progress) -> Path:
    """The release's files in a new directory `target`. An interrupted pull goes on where it stopped."""
    if target.exists():
        raise Conflict(
            "output_exists",
            f"{target} exists already.",
            subject=str(target),
            next_step="Name another directory, or remove it.",
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{release['commit'][:12]}.partial")
    aside.mkdir(exist_ok=True)

    def fetch(row: Json) -> None:
        _fetch(api, release, row, aside, progress)

    try:
        with _alone(aside, target), ThreadPoolExecutor(_PARALLEL, "pull") as pool:
            list(pool.map(fetch, release["files"]))
            aside.rename(target)
    except OSError as error:
        raise Unavailable(
            "disk_error",
            f"{target} cannot be written: {error.strerror}.",
            subject=str(target),
            next_step="Free some space and pull again.",
        ) from error
    return target


@contextmanager
def _alone(aside: Path, target: Path) -> Generator[None]:
    """Holds the directory of an unfinished pull: two pulls that append to one file would both count it as theirs."""
    handle = os.open(aside, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not aside.exists() or aside.stat().st_ino != os.fstat(handle).st_ino:
            raise BlockingIOError  # the other pull has just put it in place
        yield
    except BlockingIOError:
        raise Conflict(
            "pull_running",
            f"Another pull is writing {target}.",
            subject=str(target),
            next_step="Wait for it, or name another directory.",
        ) from None
    finally:
        os.close(handle)


def cached(api: Api, release: Json, cache: Path, progress: Progress) -> Path:
    """A directory with the release's files, pulled once and shared by every command that needs them."""
    target = cache / release["commit"] / release["repository"].replace("/", "--")
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    private = Path(mkdtemp(dir=cache, prefix=".pull-"))
    try:
        pulled = pull(api, release, private / "files", progress)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            pulled.rename(target)
        except OSError:
            if not target.is_dir():  # another process has put the same bytes there meanwhile
                raise
    finally:
        shutil.rmtree(private, ignore_errors=True)
    return target


def _fetch(api: Api, release: Json, row: Json, directory: Path, progress: Progress) -> None:
    target = directory / check_path(row["path"])
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, done = _hash_of_part(target, row["size_bytes"])
    progress(done)
    if done < row["size_bytes"] or not target.exists():
        with (
            api.stream(f"{release_path(release)}/files/{quote(row['path'])}", start=done) as chunks,
            target.open("ab") as file,
        ):
            for chunk in chunks:
                digest.update(chunk)
                file.write(chunk)
                progress(len(chunk))
            file.flush()
            os.fsync(file.fileno())
    if digest.hexdigest() != row["sha256"] or target.stat().st_size != row["size_bytes"]:
        target.unlink()
        raise _damaged(release, row)


def _damaged(release: Json, row: Json) -> RegistryError:
    return Unavailable(
        "blob_corrupt",
        f"{row['path']} of {release['repository']}:{release['version']} did not arrive as it was published.",
        subject=row["path"],
        next_step="Pull again; if it happens again the store is damaged.",
    )


def _hash_of_part(path: Path, size_bytes: int) -> tuple[Any, int]:
    """The running sha256 of what an earlier attempt left, and its length; a file that is too long starts anew."""
    digest = hashlib.sha256()
    if not path.exists():
        return digest, 0
    if path.stat().st_size > size_bytes:
        path.unlink()
        return digest, 0
    for block in _chunks(path, lambda _count: None):
        digest.update(block)
    return digest, path.stat().st_size


def _chunks(path: Path, progress: Progress) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            yield block
            progress(len(block))
