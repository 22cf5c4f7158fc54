"""Writes an object whose digest is known only at its end: in parts that are uploaded, or copied from another object.

Parts go to a key of their own below `incoming/`. The finished object is copied to the key of its blob by the store. A
crash leaves parts or an object there, which `sweep` removes.
"""

import logging
import uuid
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Semaphore
from typing import Any

from boto3.s3.transfer import TransferConfig  # pyright: ignore[reportMissingTypeStubs]
from botocore.exceptions import ClientError  # pyright: ignore[reportMissingTypeStubs]

from composer.formats.checkpoints.files import StoredFile, read_range
from registry.errors import Unavailable
from registry.formats.references import Digest
from registry.storage.blobs import BlobStat
from registry.storage.s3.bucket import Bucket, code_of, translate_store_errors
from registry.storage.s3.multipart import Parts, Stored
from registry.storage.s3.objects import CHANGED, S3File
from registry.storage.s3.probe import is_refusal, status_of

log = logging.getLogger(__name__)

INCOMING = "incoming/"
_MIB = 1 << 20
LARGE_COPY = TransferConfig(multipart_threshold=5 * 1024 * _MIB, multipart_chunksize=1024 * _MIB)
"""S3 copies at most 5 GiB in one request."""
_COPY_IN_PARTS = TransferConfig(multipart_threshold=256 * _MIB, multipart_chunksize=256 * _MIB)
"""Copying several gigabytes in one request can take longer than our timeout, or the store's."""
LEAST_BYTES = 5 * _MIB
"""The minimum size of a part in S3, except the last one."""
_USUAL_BYTES, _LARGEST_BYTES, _USUAL_PARTS = 16 * _MIB, 64 * _MIB, 200
_MAX_PARTS = 9_000  # of 10,000: the last one may be small
_IN_FLIGHT = 4
_MISSING = 404
_NAMING = ("ETag", "ChecksumCRC32", "ChecksumCRC32C", "ChecksumCRC64NVME", "ChecksumSHA1", "ChecksumSHA256")
"""The fields that a store returns for a part, and requires when the parts are joined."""
_Sent = tuple[dict[str, Any], int]
"""The store's fields for a part, and the number of bytes that the store copied by itself."""
_Send = Callable[[dict[str, str]], _Sent]


@dataclass(slots=True)
class CopySupport:
    """Whether the store copies ranges of objects as parts (UploadPartCopy): assumed until it refuses one."""

    works: bool = True

    def refused(self, error: ClientError) -> None:
        if self.works:
            log.warning("The blob store does not copy ranges of objects, which are uploaded instead: %s", error)
        self.works = False


@dataclass(slots=True)
class _CopyRun:
    """Bytes that can be copied. `kept` holds the first of them, until they suffice for a part."""

    source: S3File
    begin: int
    size_bytes: int = 0
    kept: bytearray = field(default_factory=bytearray)

    @property
    def end(self) -> int:
        return self.begin + self.size_bytes


class S3Writer:
    """A `BlobWriter`. At most four parts are in flight at once, and in memory."""

    def __init__(self, bucket: Bucket, size_bytes: int, copying: CopySupport) -> None:
        self._bucket, self._client, self._copying = bucket, bucket.client, copying
        self._named = bucket.object(f"{INCOMING}{uuid.uuid4().hex}")
        self._parts = Parts(bucket)
        self._upload: dict[str, str] | None = None
        self._least = max(LEAST_BYTES, -(-size_bytes // _MAX_PARTS))
        self._part_bytes = max(min(max(_USUAL_BYTES, size_bytes // _USUAL_PARTS), _LARGEST_BYTES), self._least)
        self._pool = ThreadPoolExecutor(_IN_FLIGHT, "part")
        self._room = Semaphore(_IN_FLIGHT)
        self._sent: list[Future[_Sent]] = []
        self._buffer, self._filled = bytearray(), 0
        self._free: deque[bytearray] = deque()
        """Buffers of sent parts, to be reused: malloc would keep freed ones in per-thread arenas."""
        self._run: _CopyRun | None = None
        self._size_bytes = 0
        self._copied_from = set[S3File]()
        self.copied_bytes = 0

    def write(self, block: memoryview, source: StoredFile | None = None, offset: int = 0) -> None:
        self._size_bytes += block.nbytes
        if not isinstance(source, S3File) or not self._can_copy(source):
            self._end_run()
            self._append(block)
            return
        if self._run is None or (self._run.source, self._run.end) != (source, offset):
            self._end_run()
            # The bytes uploaded before must be large enough for a part of their own.
            lead = min(block.nbytes, max(0, self._least - self._filled)) if self._filled else 0
            self._append(block[:lead])
            if lead == block.nbytes:
                return
            block, offset = block[lead:], offset + lead
            self._run = _CopyRun(source, offset)
        run = self._run
        run.kept += block[: max(0, self._least - len(run.kept))]
        run.size_bytes += block.nbytes
        if run.size_bytes >= max(_LARGEST_BYTES, self._least):
            self._end_run()
            self._run = _CopyRun(run.source, run.end)

    def finish(self, sha256: Digest) -> BlobStat:
        self._end_run()
        named = self._bucket.blob(sha256)
        try:
            if self._upload is None:
                if self._bucket.head(named) is None:
                    with translate_store_errors(sha256):
                        self._client.put_object(**named, Body=self._content())
            else:
                self._join(named, sha256)
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)
        head = self._bucket.head(named)
        if head is None or head["ContentLength"] != self._size_bytes:
            raise Unavailable(
                "store_wrong", f"The store did not keep all of {sha256}.", subject=sha256, next_step="Write it again."
            )
        self._discard()
        return BlobStat(sha256, head["ContentLength"], head["LastModified"])

    def abort(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._discard()

    def _can_copy(self, source: S3File) -> bool:
        same = source.bucket.client.meta.endpoint_url == self._client.meta.endpoint_url
        return same and self._copying.works

    def _append(self, block: memoryview | bytearray) -> None:
        left = memoryview(block)
        while left.nbytes:
            if not self._filled:
                self._buffer = self._free.pop() if self._free else bytearray(self._part_bytes)
            taken = left[: self._part_bytes - self._filled]
            self._buffer[self._filled : self._filled + taken.nbytes] = taken
            self._filled += taken.nbytes
            left = left[taken.nbytes :]
            if self._filled == self._part_bytes:
                self._flush()

    def _content(self) -> bytes | bytearray:
        """The bytes of the next part."""
        full = self._filled == self._part_bytes
        return self._buffer if full else bytes(memoryview(self._buffer)[: self._filled])

    def _end_run(self) -> None:
        """Copies the run, or uploads one that is too short for a part."""
        run, self._run = self._run, None
        if run is None or not run.size_bytes:
            return
        if run.size_bytes < self._least:
            self._append(run.kept)
            return
        self._flush()
        number = len(self._sent) + 1
        self._copied_from.add(run.source)
        self._start(lambda upload: self._copy_part(upload, number, run))

    def _flush(self) -> None:
        if not self._filled:
            return
        number, content, buffer = len(self._sent) + 1, self._content(), self._buffer
        self._filled = 0

        def send(upload: dict[str, str]) -> _Sent:
            try:
                return self._put_part(upload, number, content), 0
            finally:
                self._free.append(buffer)

        self._start(send)

    def _start(self, send: _Send) -> None:
        """Sends the next part once a slot is free. Raises the error of an earlier part."""
        if self._upload is None:
            with translate_store_errors(self._named["Key"]):
                self._upload = {**self._named, "UploadId": self._parts.begin(self._named, checked=False)}
        upload = self._upload
        self._room.acquire()

        def run() -> _Sent:
            try:
                with translate_store_errors(self._named["Key"]):
                    return send(upload)
            finally:
                self._room.release()

        for sent in self._sent[-2 * _IN_FLIGHT :]:
            if sent.done():
                sent.result()
        self._sent.append(self._pool.submit(run))

    def _put_part(self, upload: dict[str, str], number: int, content: bytes | bytearray) -> dict[str, Any]:
        return self._client.upload_part(**upload, PartNumber=number, Body=content)

    def _copy_part(self, upload: dict[str, str], number: int, run: _CopyRun) -> _Sent:
        if self._copying.works:
            try:
                answer = self._client.upload_part_copy(
                    **upload,
                    PartNumber=number,
                    CopySource=run.source.named,
                    CopySourceIfMatch=run.source.etag,
                    CopySourceRange=f"bytes={run.begin}-{run.end - 1}",
                )
            except ClientError as error:
                if code_of(error) in CHANGED:
                    raise run.source.changed() from error
                if not is_refusal(error) or status_of(error) == _MISSING:
                    raise
                self._copying.refused(error)
            else:
                return answer["CopyPartResult"], run.size_bytes
        return self._put_part(upload, number, read_range(run.source, run.begin, run.end)), 0

    def _join(self, named: dict[str, str], sha256: Digest) -> None:
        """Joins the parts, and lets the store copy the object to its blob's key."""
        self._flush()
        stored: Stored = {}
        for number, sent in enumerate(self._sent, start=1):
            said, copied = sent.result()
            stored = {**stored, number: said}
            self.copied_bytes += copied
        for source in self._copied_from:  # not every store honours the condition of a part's copy
            source.refuse_changed()
        with translate_store_errors(sha256):
            self._parts.join(self._upload or {}, stored, _NAMING)
            self._upload = None
            if self._bucket.head(named) is None:
                self._copy_to(named)

    def _copy_to(self, named: dict[str, str]) -> None:
        if self._copying.works:
            try:
                self._client.copy(self._named, named["Bucket"], named["Key"], Config=_COPY_IN_PARTS)
            except ClientError as error:
                if not is_refusal(error):
                    raise
                self._copying.refused(error)
            else:
                return
        self._client.copy(self._named, named["Bucket"], named["Key"], Config=LARGE_COPY)

    def _discard(self) -> None:
        with translate_store_errors(self._named["Key"]):
            if self._upload is not None:
                self._parts.abort(self._upload)
            self._client.delete_object(**self._named)
