"""Blobs in S3 or a compatible store, through boto3; credentials come from its usual chain."""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import boto3  # pyright: ignore[reportMissingTypeStubs]
from boto3.exceptions import S3UploadFailedError  # pyright: ignore[reportMissingTypeStubs]
from botocore.config import Config  # pyright: ignore[reportMissingTypeStubs]
from botocore.exceptions import BotoCoreError, ClientError  # pyright: ignore[reportMissingTypeStubs]

from registry.errors import NotFound, Unavailable
from registry.names import Digest
from registry.settings import S3Storage
from registry.storage.blobs import BlobStat, Reader, blob_key

_MISSING = {"404", "NoSuchKey", "NotFound"}


class S3Store:
    """One client per process. Version 4 signatures, since 2 signs no headers; paths, since not every store has DNS."""

    def __init__(self, storage: S3Storage) -> None:
        self._bucket, self._prefix = storage.bucket, storage.prefix
        config = Config(
            signature_version="s3v4",
            s3={"addressing_style": "path"},
            retries={"mode": "adaptive", "max_attempts": 5},
            max_pool_connections=40,
        )
        self._client: Any = boto3.client("s3", endpoint_url=storage.endpoint_url, config=config)  # pyright: ignore[reportUnknownMemberType]

    def stat(self, sha256: Digest) -> BlobStat | None:
        with _told(sha256):
            try:
                head = self._client.head_object(Bucket=self._bucket, Key=self._key(sha256))
            except ClientError as error:
                if _code(error) in _MISSING:
                    return None
                raise
        return BlobStat(sha256, head["ContentLength"], head["LastModified"])

    def open(self, sha256: Digest, start: int = 0, length: int | None = None) -> Reader:
        if length == 0:
            return _Body(None)
        last = "" if length is None else str(start + length - 1)
        wanted = {"Range": f"bytes={start}-{last}"} if start or length is not None else {}
        with _told(sha256):
            try:
                found = self._client.get_object(Bucket=self._bucket, Key=self._key(sha256), **wanted)
            except ClientError as error:
                if _code(error) == "InvalidRange":  # from the end on there is nothing to read, which is no failure
                    return _Body(None)
                raise
        return _Body(found["Body"])

    def put(self, sha256: Digest, source: Path, *, move: bool = False) -> BlobStat:
        stat = self.stat(sha256)
        if stat is None:
            with _told(sha256):
                self._client.upload_file(str(source), self._bucket, self._key(sha256))
            stat = self.stat(sha256)
        if stat is None or stat.size_bytes != source.stat().st_size:
            raise Unavailable(
                "store_wrong", f"The store did not keep {sha256} whole.", subject=sha256, next_step="Push again."
            )
        if move:
            source.unlink()
        return stat

    def url(self, sha256: Digest, expires_s: int) -> str | None:
        request = {"Bucket": self._bucket, "Key": self._key(sha256)}
        return self._client.generate_presigned_url("get_object", Params=request, ExpiresIn=expires_s)

    def delete(self, sha256: Digest) -> None:
        with _told(sha256):
            self._client.delete_object(Bucket=self._bucket, Key=self._key(sha256))

    def iterate(self) -> Iterator[BlobStat]:
        with _told(self._bucket):
            for page in self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=f"{self._prefix}blobs/"
            ):
                for row in page.get("Contents", ()):
                    yield BlobStat(Digest(row["Key"].rpartition("/")[2]), row["Size"], row["LastModified"])

    def _key(self, sha256: Digest) -> str:
        return f"{self._prefix}{blob_key(sha256)}"


class _Body:
    """A response's body; None is an empty one, which S3 cannot be asked for by range."""

    def __init__(self, body: Any) -> None:
        self._body = body

    def read(self, size: int = -1, /) -> bytes:
        with _told("blob"):
            return self._body.read(None if size < 0 else size) if self._body is not None else b""

    def close(self) -> None:
        if self._body is not None:
            self._body.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextmanager
def _told(subject: str) -> Generator[None]:
    try:
        yield
    except (BotoCoreError, ClientError, S3UploadFailedError) as error:
        if isinstance(error, ClientError) and _code(error) in _MISSING:
            raise NotFound(
                "blob_missing",
                f"The store has no blob {subject}.",
                subject=subject,
                next_step="Push the file again, or restore the blob from a backup.",
            ) from error
        raise Unavailable(
            "store_unavailable",
            f"The blob store does not answer as it should: {error}.",
            subject=subject,
            next_step="Try again.",
        ) from error


def _code(error: ClientError) -> str:
    response: Any = error.response
    return str(response.get("Error", {}).get("Code", ""))
