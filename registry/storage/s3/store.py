"""Blobs, results of units and backups in S3 or a compatible store, through boto3 with its usual credentials."""

from collections.abc import Collection, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from botocore.exceptions import ClientError  # pyright: ignore[reportMissingTypeStubs]

from registry.environment.settings import S3Storage
from registry.errors import NotFound, Unavailable
from registry.formats.references import Digest
from registry.storage.archive import DOCUMENTS, unknown_document
from registry.storage.blobs import MAX_RESULT_BYTES, WORK, BlobStat, Reader
from registry.storage.s3.bucket import MISSING, Bucket, code_of, open_bucket, translate_store_errors
from registry.storage.s3.probe import FactsRecord
from registry.storage.s3.uploads import S3Arrivals
from registry.storage.s3.writer import CopySupport, S3Writer


class S3Results:
    """Results of units of work, one object each under `work/`: S3 shows an object completely or not at all."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._client: Any = self._bucket.client

    def read(self, key: str) -> bytes | None:
        with translate_store_errors(key):
            try:
                body = self._client.get_object(**self._named(key))["Body"]
            except ClientError as error:
                if code_of(error) in MISSING:
                    return None
                raise
            with body:
                return body.read(MAX_RESULT_BYTES)

    def write(self, key: str, content: bytes) -> None:
        with translate_store_errors(key):
            self._client.put_object(**self._named(key), Body=content)

    def delete(self, key: str) -> None:
        with translate_store_errors(key):
            self._client.delete_object(**self._named(key))

    def sweep(self, before: datetime) -> int:
        removed = 0
        for row in self._bucket.listed(WORK):
            if row["LastModified"] < before:
                with translate_store_errors(row["Key"]):
                    self._client.delete_object(Bucket=self._bucket.name, Key=row["Key"])
                removed += 1
        return removed

    def _named(self, key: str) -> dict[str, str]:
        return self._bucket.object(f"{WORK}{key}.json")


_PLAIN = {
    "ResponseContentEncoding": "identity",
    "ResponseContentType": "application/octet-stream",
    "ResponseContentDisposition": "attachment",
    "ResponseCacheControl": "private, immutable",
}
"""Overrides headers of the stored object: the sender of a blob may have set false ones, which clients and browsers
would believe."""


class S3Store:
    """A BlobStore in a bucket. A `record` keeps the checks that the store was found to make."""

    def __init__(self, storage: S3Storage, record: FactsRecord | None = None) -> None:
        self._bucket: Bucket = open_bucket(storage)
        self._client: Any = self._bucket.client
        self.arrivals = S3Arrivals(self._bucket, storage, record=record)
        self._copying = CopySupport()

    def stat(self, sha256: Digest) -> BlobStat | None:
        head = self._bucket.head(self._bucket.blob(sha256))
        return BlobStat(sha256, head["ContentLength"], head["LastModified"]) if head is not None else None

    def open(self, sha256: Digest, start: int = 0, length: int | None = None) -> Reader:
        if length == 0:
            return Body(None)
        last = "" if length is None else str(start + length - 1)
        wanted = {"Range": f"bytes={start}-{last}"} if start or length is not None else {}
        with translate_store_errors(sha256):
            try:
                answer = self._client.get_object(**self._bucket.blob(sha256), **wanted)
            except ClientError as error:
                if code_of(error) == "InvalidRange":  # reading from the end on is not an error
                    return Body(None)
                raise
        return Body(answer["Body"])

    def put(self, sha256: Digest, source: Path, *, move: bool = False) -> BlobStat:
        stat = self.stat(sha256)
        if stat is None:
            named = self._bucket.blob(sha256)
            with translate_store_errors(sha256):
                self._client.upload_file(str(source), named["Bucket"], named["Key"])
            stat = self.stat(sha256)
        if stat is None or stat.size_bytes != source.stat().st_size:
            raise Unavailable("store_wrong", f"The store did not keep all of {sha256}.", subject=sha256)
        if move:
            source.unlink()
        return stat

    def begin_write(self, size_bytes: int) -> S3Writer:
        return S3Writer(self._bucket, size_bytes, self._copying)

    def url(self, sha256: Digest, expires_s: int, disposition: str | None = None) -> str | None:
        named = {"ResponseContentDisposition": disposition} if disposition is not None else {}
        request = {**self._bucket.blob(sha256), **_PLAIN, **named}
        return self._client.generate_presigned_url("get_object", Params=request, ExpiresIn=expires_s)

    def unit_results(self) -> S3Results:
        return S3Results(self._bucket)

    def delete(self, sha256: Digest) -> None:
        with translate_store_errors(sha256):
            self._client.delete_object(**self._bucket.blob(sha256))

    def iterate(self) -> Iterator[BlobStat]:
        for row in self._bucket.listed("blobs/"):
            yield BlobStat(Digest(row["Key"].rpartition("/")[2]), row["Size"], row["LastModified"])

    def sweep(self, before: datetime, keep: Collection[str]) -> int:
        return self.arrivals.sweep(before, keep)


class Body(Reader):
    """A response's body; None is an empty one, which S3 cannot serve by range."""

    def __init__(self, body: Any) -> None:
        self._body = body

    def read(self, size: int = -1, /) -> bytes:
        with translate_store_errors("blob"):
            return self._body.read(None if size < 0 else size) if self._body is not None else b""

    def close(self) -> None:
        if self._body is not None:
            self._body.close()


class S3Archive:
    """An Archive below a prefix of a bucket; files on their way are in `scratch`."""

    def __init__(self, storage: S3Storage, scratch: Path) -> None:
        self._bucket = open_bucket(storage)
        self._client: Any = self._bucket.client
        self.blobs = S3Store(storage)
        self.scratch = scratch

    def save(self, name: str, source: Path) -> None:
        named = self._bucket.object(DOCUMENTS + name)
        with translate_store_errors(name):
            self._client.upload_file(str(source), named["Bucket"], named["Key"])

    def open(self, name: str) -> Reader:
        try:
            with translate_store_errors(name):
                return Body(self._client.get_object(**self._bucket.object(DOCUMENTS + name))["Body"])
        except NotFound:
            raise unknown_document(name) from None

    def names(self) -> Iterator[str]:
        beginning = self._bucket.object(DOCUMENTS)["Key"]
        for row in self._bucket.listed(DOCUMENTS):
            yield row["Key"].removeprefix(beginning)

    def delete(self, name: str) -> None:
        with translate_store_errors(name):
            self._client.delete_object(**self._bucket.object(DOCUMENTS + name))
