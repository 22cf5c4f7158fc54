"""Push: sends what the store lacks, in parallel pieces, and resumes where an earlier attempt stopped."""

import hashlib
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, NotRequired, TypedDict

from composer.formats.checkpoints.hashing import hash_file
from registry.client.api import Api, line_path
from registry.client.partial_files import blocks
from registry.client.retries import Progress, map_in_threads, pauses, send_once, with_retries
from registry.client.selection import Selection
from registry.errors import Conflict, Invalid, NotFound, RegistryError, Unavailable
from registry.formats.manifest import ManifestFile
from registry.formats.references import Digest, RepositoryName
from registry.wire.catalog import PublishedOut
from registry.wire.transfer import PutOut, UploadOut, UploadRow

_CHANGED = ("digest_differs", "size_differs")


@dataclass(frozen=True, slots=True)
class PushedFile:
    """A file to push, with its digest."""

    source: Path
    manifest: ManifestFile


def collect(selection: Selection, progress: Progress = lambda _count: None) -> list[PushedFile]:
    """Hashes the selected files."""

    def hashed(name: str) -> PushedFile:
        path = selection.directory / name
        return PushedFile(path, ManifestFile(name, path.stat().st_size, Digest(hash_file(path, progress))))

    return map_in_threads(hashed, selection.paths)


class ReleaseOptions(TypedDict):
    """The part of a `ReleaseIn` that a user writes."""

    version: str | None
    bump: str | None
    notes: str
    allow_breaking: str | None


class ReleaseRequest(ReleaseOptions):
    """A `ReleaseIn` without its files."""

    provenance: Mapping[str, Any] | None
    base: str
    strict: NotRequired[bool]


def push(
    api: Api,
    files: Sequence[PushedFile],
    name: RepositoryName,
    kind: str,
    release: ReleaseRequest,
    progress: Progress,
) -> tuple[PublishedOut, int]:
    """Sends what the store lacks, then publishes the release. `release` is the request without its files.

    Returns the registry's answer, and the number of files that the store lacked.
    """
    sent = send(api, name.namespace, files, progress)
    stated = {key: value for key, value in release.items() if key != "strict" or value}  # older servers do not know it
    path, body = f"{line_path(name, kind)}/releases", {**stated, "files": _rows(files)}
    published, _ = send_once(partial(api.post, path, body, PublishedOut), f"adaptory log {name}")
    return published, sent


def send(api: Api, namespace: str, files: Sequence[PushedFile], progress: Progress) -> int:
    """Sends files until the namespace holds all of them. Returns how many were incomplete at the start.

    After a failure, queries the missing files again, so that nothing is sent twice; gives up after several attempts
    without progress. Raises Invalid with the name of a file that changed meanwhile."""
    left = pauses()
    plan, reported = with_retries(lambda: _plan(api, namespace, files), left), 0
    lacking = len(_uploads(plan, files))
    while True:
        uploads = _uploads(plan, files)
        there = sum(file.manifest.size_bytes for file in files) - sum(upload.missing_bytes for upload in uploads)
        progress(there - reported)
        attempt = _Attempt(api, progress)
        attempt.run(uploads)
        if attempt.error is None:
            return lacking
        # A file may have changed: stores refuse unexpected bytes mostly by hanging up, as if the network failed.
        for file in attempt.broken:
            if hash_file(file.source) != file.manifest.sha256:
                raise _changed(file)
        reported = there + attempt.reported
        if attempt.came_further:
            left = pauses()
        pause = next(left, None)
        if pause is None:
            raise attempt.error
        time.sleep(pause)
        plan = with_retries(lambda: _plan(api, namespace, files), left)


def _plan(api: Api, namespace: str, files: Sequence[PushedFile]) -> list[UploadRow]:
    return api.post("/v1/uploads", {"namespace": namespace, "files": _rows(files)}, UploadOut).files


@dataclass(slots=True)
class _Piece:
    """A whole file with its `put`, or a numbered part, whose `put` is requested before it is sent."""

    start: int
    size_bytes: int
    put: PutOut | None = None
    number: int | None = None


@dataclass(slots=True)
class _Upload:
    """The upload of one file. The thread that sends the last piece completes it."""

    upload_id: str
    file: PushedFile
    pieces: list[_Piece]
    unsent: int = field(init=False)

    def __post_init__(self) -> None:
        self.unsent = len(self.pieces)

    @property
    def missing_bytes(self) -> int:
        return sum(piece.size_bytes for piece in self.pieces)


class _Attempt:
    """Sends pieces until one fails; then pieces in flight may finish, but no other starts."""

    def __init__(self, api: Api, progress: Progress) -> None:
        self._api, self._progress = api, progress
        self._lock = Lock()
        self.error: RegistryError | None = None
        self.broken: list[PushedFile] = []
        self.came_further = False
        self.reported = 0

    def run(self, uploads: Sequence[_Upload]) -> None:
        map_in_threads(self._complete, [upload for upload in uploads if not upload.pieces])
        map_in_threads(self._send, [(upload, piece) for upload in uploads for piece in upload.pieces])

    def _send(self, part: tuple[_Upload, _Piece]) -> None:
        upload, piece = part
        if self.error is not None:
            return
        with self._noted(upload):
            put = piece.put if piece.put is not None else self._put_of_part(upload, piece)
            self._api.send(put, _blocks(upload.file.source, piece, self._tell))
            with self._lock:
                self.came_further = True
                upload.unsent -= 1
                was_last = not upload.unsent
            if was_last:
                self._api.post(f"/v1/uploads/{upload.upload_id}/complete")

    def _put_of_part(self, upload: _Upload, piece: _Piece) -> PutOut:
        """Hashes the part just before it is sent, so that the second read comes from the page cache."""
        digest = hashlib.sha256()
        for block in _blocks(upload.file.source, piece):
            digest.update(block)
        path = f"/v1/uploads/{upload.upload_id}/parts/{piece.number}"
        return self._api.post(path, {"sha256": digest.hexdigest()}, PutOut)

    def _complete(self, upload: _Upload) -> None:
        with self._noted(upload):
            self._api.post(f"/v1/uploads/{upload.upload_id}/complete")

    @contextmanager
    def _noted(self, upload: _Upload) -> Generator[None]:
        """Records an error worth retrying; names the file in one that is not."""
        try:
            yield
        except (Unavailable, Conflict, NotFound) as error:
            with self._lock:
                self.error = error
                self.broken.append(upload.file)
        except Invalid as error:
            raise _changed(upload.file) if error.code in _CHANGED else error from error

    def _tell(self, count: int) -> None:
        with self._lock:
            self.reported += count
        self._progress(count)


def _uploads(plan: Sequence[UploadRow], files: Sequence[PushedFile]) -> list[_Upload]:
    """The uploads to do; one for files of the same content."""
    wanted = {row.sha256: row for row in plan if not row.present}
    by_digest: dict[str, PushedFile] = {file.manifest.sha256: file for file in files}
    return [
        _Upload(row.upload or "", by_digest[sha256], _pieces(row, by_digest[sha256])) for sha256, row in wanted.items()
    ]


def _pieces(row: UploadRow, file: PushedFile) -> list[_Piece]:
    if row.put is not None:
        return [_Piece(0, file.manifest.size_bytes, row.put)]
    pieces: list[_Piece] = []
    start = 0
    for part in row.parts:
        if not part.present:
            pieces.append(_Piece(start, part.size_bytes, number=part.number))
        start += part.size_bytes
    return pieces


def _rows(files: Sequence[PushedFile]) -> list[dict[str, object]]:
    return [asdict(file.manifest) for file in files]


def _changed(file: PushedFile) -> Invalid:
    return Invalid(
        "digest_differs",
        f"{file.manifest.path} has changed since the push began.",
        subject=file.manifest.path,
        next_step="Make sure that nothing writes to it, and push again.",
    )


def _blocks(path: Path, piece: _Piece, tell: Progress = lambda count: None) -> Iterator[bytes]:
    for block in blocks(path, piece.start, piece.size_bytes):
        yield block
        tell(len(block))
