"""Pull: fetches pieces of files in parallel, verifies every file, and creates the directory atomically.

Unfinished files lie in a staging directory beside the target. After an interruption they are reused and verified like
everything else; a file that turns out wrong is fetched again.
"""

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from tempfile import mkdtemp
from threading import Lock
from urllib.parse import quote

from composer.errors import InvalidFile
from composer.formats.checkpoints.hashing import hash_file
from registry.client.api import Api, untrusted
from registry.client.cache import BlobCache, is_regular
from registry.client.partial_files import PartialFile
from registry.client.retries import Progress, map_in_threads, pauses
from registry.environment.home import close_directory
from registry.errors import NO_SPACE, Conflict, RegistryError, Unavailable
from registry.formats.manifest import ManifestFile, canonical_manifest, commit_id, refuse_hidden
from registry.formats.references import RepositoryName, Version, parse_digest, parse_repository, parse_version
from registry.wire.search import AnyRelease

_SIGNS_OF_A_RELEASE = ("adapter_config.json", "config.json")
"""Every adapter has the first one, every model the second."""


@dataclass(frozen=True, slots=True)
class _Release:
    """A registry's answer, validated: `commit` is that of the files.

    Validation matters because parts of the answer become local paths.
    """

    repository: RepositoryName
    version: Version
    commit: str
    path: str
    files: tuple[ManifestFile, ...]


def _parse_release(release: AnyRelease) -> _Release:
    try:
        files = tuple(ManifestFile(row.path, row.size_bytes, parse_digest(row.sha256)) for row in release.files)
        repository, version = parse_repository(release.repository), parse_version(release.version)
        commit = commit_id(canonical_manifest(files))
    except RegistryError as error:
        raise untrusted("bad_answer", error.detail) from error
    if release.commit != commit:
        raise untrusted(
            "commit_differs", f"the commit of {repository}:{version} is not that of its files, {commit[:12]}."
        )
    for file in files:
        refuse_hidden(file.path)
    return _Release(repository, version, commit, release.path, files)


def pull(  # noqa: PLR0913
    api: Api,
    release: AnyRelease,
    target: Path,
    progress: Progress,
    cache: BlobCache | None = None,
    check: Callable[[Path], None] | None = None,
    *,
    replace: bool = False,
) -> Path:
    """Pulls the release's files into the directory `target`. Resumes an interrupted pull.

    A `target` that holds exactly these files is verified and kept; with `replace`, another release there is replaced.
    `check` may refuse the verified files, by raising, before they appear. With a `cache`, files are links into it.

    Raises Invalid for an inconsistent answer, before anything is written; Conflict for a `target` that holds anything
    else.
    """
    wanted = _parse_release(release)
    staging = target.with_name(f".{target.name}.{wanted.commit[:12]}.partial")
    if _is_intact(target, wanted.files, progress):
        if check is not None:
            check(target)
        _remove_left(staging, target)
        return target
    _refuse_occupied(target, f"{wanted.repository}:{wanted.version}", replace=replace)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir(exist_ok=True)
        with _alone(staging, target):
            _Pull(api, wanted, staging, progress, cache).run()
            if check is not None:
                _checked(check, staging)
            _put_in_place(staging, target)
            shutil.rmtree(staging)
    except OSError as error:
        raise Unavailable(
            "disk_error",
            f"{target} cannot be written: {error.strerror}.",
            subject=str(target),
            next_step="Free some space and pull again."
            if error.errno in NO_SPACE
            else "Check that its directory is writable, and pull again.",
        ) from error
    return target


def cached(api: Api, release: AnyRelease, cache: Path, progress: Progress) -> Path:
    """A shared cache directory with exactly the release's files.

    Pulled once and verified on every use (1 to 2 GB/s per file), since root, a failing disk or a careless script could
    change it; pulled again if it differs.
    """
    wanted = _parse_release(release)
    target = cache / wanted.commit / f"{wanted.repository.namespace}--{wanted.repository.name}"
    if _is_intact(target, wanted.files, progress):
        return target
    close_directory(cache)
    private = Path(mkdtemp(dir=cache, prefix=".pull-"))
    try:
        with suppress(FileNotFoundError):
            target.rename(private / "damaged")
        pulled = pull(api, release, private / "files", progress, BlobCache(cache / "blobs"))
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            pulled.rename(target)
        except OSError:
            if not target.is_dir():  # another process has stored the same files meanwhile
                raise
    finally:
        shutil.rmtree(private, ignore_errors=True)
    return target


def _refuse_occupied(target: Path, wanted: str, *, replace: bool) -> None:
    """Raises Conflict unless `target` does not exist, is an empty directory, or, with `replace`, contains an adapter or
    model: `--force -o ~` must not delete a home directory."""
    if not target.exists() and not target.is_symlink():
        return
    is_directory = target.is_dir() and not target.is_symlink()
    if is_directory and not any(target.iterdir()):
        return
    if is_directory and any((target / name).is_file() for name in _SIGNS_OF_A_RELEASE):
        if replace:
            return
        next_step = "Name another directory, or replace it with --force."
    else:
        next_step = "Name another directory, or remove it."
    message = f"{target} already exists and is not {wanted} as published."
    raise Conflict("output_exists", message, subject=str(target), next_step=next_step)


def _put_in_place(staging: Path, target: Path) -> None:
    """Moves the old files into `staging` and the new ones to `target`; moves the old ones back if that fails."""
    replaced = staging / "replaced"
    with suppress(FileNotFoundError):
        target.rename(replaced)
    try:
        (staging / "files").rename(target)
    except OSError:
        if replaced.exists():
            replaced.rename(target)
        raise


def _remove_left(staging: Path, target: Path) -> None:
    """Removes what a pull left that was killed after it had put its files in place."""
    # The files are whole all the same, and another pull of the same target may be removing it.
    with suppress(OSError, Conflict), _alone(staging, target):
        shutil.rmtree(staging)


def _is_intact(directory: Path, files: Sequence[ManifestFile], progress: Progress) -> bool:
    """Checks that the directory has exactly these files, as published."""
    there = [path for path in directory.rglob("*") if path.is_symlink() or not path.is_dir()]
    if {path.relative_to(directory).as_posix() for path in there} != {file.path for file in files}:
        return False
    if directory.is_symlink() or not all(map(is_regular, there)):
        return False
    reported = 0
    lock = Lock()

    def tell(count: int) -> None:
        nonlocal reported
        with lock:
            reported += count
        progress(count)

    def is_same(file: ManifestFile) -> bool:
        try:
            return hash_file(directory / file.path, tell) == file.sha256
        except (OSError, InvalidFile):  # unreadable, or truncated meanwhile
            return False

    intact = all(map_in_threads(is_same, files))
    if not intact:
        progress(-reported)
    return intact


class _Pull:
    """The files of one release below `staging/files`, and what is known of their pieces below `staging/pieces`."""

    def __init__(self, api: Api, release: _Release, staging: Path, progress: Progress, cache: BlobCache | None) -> None:
        self._api, self._release, self._progress, self._cache = api, release, progress, cache
        self._staging = staging
        for name in ("files", "pieces"):
            (staging / name).mkdir(exist_ok=True)
        self._files = [
            PartialFile(file, staging / "files" / file.path, staging / "pieces" / str(number))
            for number, file in enumerate(release.files)
        ]
        self._finished: set[str] = set()
        self._urls: dict[str, str] = {}

    def run(self) -> None:
        """Runs a second round for files that an earlier attempt left damaged; those then start from nothing."""
        while pending := [file for file in self._files if file.wanted.path not in self._finished]:
            map_in_threads(self._look_here, pending)
            lacking = [file for file in pending if file.wanted.path not in self._finished]
            self._make_room(lacking)
            pieces = [(number, file) for file in lacking for number in file.missing]
            # First pieces first: files that arrive in order are hashed as they arrive.
            map_in_threads(self._fetch, sorted(pieces, key=itemgetter(0)))

    def _look_here(self, file: PartialFile) -> None:
        """Uses what is local: a complete file, a cache entry, or a partial file, in this order."""
        if file.complete and file.verdict():
            self._progress(file.wanted.size_bytes)
            self._finish(file)
            return
        if file.complete:
            file.forget()
        file.target.parent.mkdir(parents=True, exist_ok=True)
        if self._cache is not None and self._cache.take(file.wanted.sha256, file.target):
            self._progress(file.wanted.size_bytes)
            self._finished.add(file.wanted.path)
            return
        self._progress(file.done_bytes)

    def _make_room(self, files: list[PartialFile]) -> None:
        """Allocates the files. Raises Unavailable, before taking any space, if the disk is too full for them."""
        lacking_bytes = sum(file.lacking_bytes for file in files)
        if lacking_bytes > shutil.disk_usage(self._staging).free:
            raise Unavailable(
                "disk_full",
                f"The disk is full: {self._name} needs another {lacking_bytes / 1e6:,.0f} MB.",
                subject=self._name,
                next_step=f"Free some space on the disk of {self._staging}.",
            )
        for file in files:
            file.prepare()

    def _fetch(self, piece: tuple[int, PartialFile]) -> None:
        number, file = piece
        path, (start, length) = file.wanted.path, file.span(number)
        got, left = 0, pauses()
        with file.opened() as descriptor:
            while got < length:
                before = got
                try:
                    url = self._urls.get(path, f"{self._release.path}/files/{quote(path)}")
                    with self._api.stream(url, start + got, length - got) as stream:
                        self._urls[path] = stream.url
                        for block in stream.chunks:
                            taken = block[: length - got]
                            os.pwrite(descriptor, taken, start + got)
                            file.passing(start + got, taken)
                            self._progress(len(taken))
                            got += len(taken)
                    if got == before:
                        raise self._ends_early(file)
                except Unavailable as error:
                    if error.code == "http_416":
                        raise self._ends_early(file) from error
                    if error.code in ("blob_lost", "blob_corrupt"):
                        raise
                    self._urls.pop(file.wanted.path, None)  # the store's address may have expired
                    left = pauses() if got > before else left
                    pause = next(left, None)
                    if pause is None:
                        raise
                    time.sleep(pause)
            os.fdatasync(descriptor)  # other threads continue meanwhile; recorded pieces survive a power cut
        self._judge(file, file.arrived(number))

    @property
    def _name(self) -> str:
        return f"{self._release.repository}:{self._release.version}"

    def _judge(self, file: PartialFile, verdict: bool | None) -> None:
        if verdict:
            self._finish(file)
        elif verdict is False and file.resumed:
            self._progress(-file.wanted.size_bytes)
            file.forget()
        elif verdict is False:
            file.target.unlink()
            raise Unavailable(
                "blob_corrupt",
                f"{file.wanted.path} of {self._name} was damaged on the way or in the store.",
                subject=file.wanted.path,
            )

    def _ends_early(self, file: PartialFile) -> Unavailable:
        return Unavailable(
            "blob_corrupt",
            f"{file.wanted.path} of {self._name} is damaged: the store lacks some of its bytes.",
            subject=file.wanted.path,
            next_step="Inform the registry's operators: `adaptory fsck` lists what is damaged.",
        )

    def _finish(self, file: PartialFile) -> None:
        if self._cache is not None:
            self._cache.keep(file.wanted.sha256, file.target)
        self._finished.add(file.wanted.path)


def _checked(check: Callable[[Path], None], staging: Path) -> None:
    """Runs `check`; deletes the files if it refuses, since it would refuse them again."""
    try:
        check(staging / "files")
    except BaseException:
        shutil.rmtree(staging)
        raise


@contextmanager
def _alone(staging: Path, target: Path) -> Generator[None]:
    """Locks the staging directory: two pulls must not write the same files."""
    handle = os.open(staging, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not staging.exists() or staging.stat().st_ino != os.fstat(handle).st_ino:
            raise BlockingIOError  # the other pull has just finished
        yield
    except BlockingIOError:
        raise Conflict("pull_running", f"Another pull is writing {target}.", subject=str(target)) from None
    finally:
        os.close(handle)
