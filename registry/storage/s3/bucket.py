"""A bucket, with boto3's errors translated."""

import logging
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType
from typing import Any, TypedDict

import boto3  # pyright: ignore[reportMissingTypeStubs]
from boto3.exceptions import S3UploadFailedError  # pyright: ignore[reportMissingTypeStubs]
from botocore.config import Config  # pyright: ignore[reportMissingTypeStubs]
from botocore.exceptions import BotoCoreError, ClientError  # pyright: ignore[reportMissingTypeStubs]

from registry.environment.settings import S3Storage
from registry.errors import Unavailable
from registry.errors.outages import OutageLog
from registry.formats.references import Digest
from registry.storage.blobs import blob_key, blob_missing

outages = OutageLog(logging.getLogger(__name__))

MISSING = {"404", "NoSuchKey", "NotFound"}
"""Codes of a missing object. A missing bucket has a code of its own and is the operator's fault."""
NO_HEADERS: Mapping[str, str] = MappingProxyType({})
_to_sign: ContextVar[Mapping[str, str]] = ContextVar("_to_sign", default=NO_HEADERS)


class ObjectHead(TypedDict):
    """The headers of an object."""

    ContentLength: int
    LastModified: datetime
    ETag: str
    Metadata: dict[str, str]


class ListedObject(TypedDict):
    Key: str
    Size: int
    LastModified: datetime


@dataclass(frozen=True, slots=True)
class Bucket:
    """One client per process: boto3's are safe to share between threads."""

    client: Any
    name: str
    prefix: str

    def blob(self, sha256: Digest) -> dict[str, str]:
        """The object of a blob, as arguments of boto3's calls."""
        return self.object(blob_key(sha256))

    def object(self, key: str) -> dict[str, str]:
        """The bucket and full key of an object, as arguments of boto3's calls."""
        return {"Bucket": self.name, "Key": f"{self.prefix}{key}"}

    def head(self, named: dict[str, str]) -> ObjectHead | None:
        """The object's headers; None if it is missing."""
        with translate_store_errors(named["Key"]):
            try:
                return self.client.head_object(**named)
            except ClientError as error:
                if code_of(error) in MISSING:
                    return None
                raise

    def signed_url(
        self, operation: str, params: Mapping[str, Any], expires_s: int, headers: Mapping[str, str] = NO_HEADERS
    ) -> str:
        """Signs a request. `headers`, for which boto3 has no parameter, are signed too."""
        token = _to_sign.set(headers)
        try:
            with translate_store_errors(params["Key"]):
                return self.client.generate_presigned_url(operation, Params=params, ExpiresIn=expires_s)
        finally:
            _to_sign.reset(token)

    def listed(self, beginning: str) -> Iterator[ListedObject]:
        """Yields every object whose key begins with `beginning`."""
        with translate_store_errors(self.name):
            pages = self.client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self.name, Prefix=f"{self.prefix}{beginning}"):
                yield from page.get("Contents", ())


def open_bucket(storage: S3Storage) -> Bucket:
    """Opens a bucket, with version 4 signatures, since version 2 signs no headers, and path addresses, since not every
    store has a host name per bucket.

    A hanging store costs a request `(connect + read timeout) * attempts` seconds, then the caller gets an error.
    Retries are standard, not adaptive: adaptive ones keep waiting after the store is back.
    """
    config = Config(
        signature_version="s3v4",
        s3={"addressing_style": "path"},
        connect_timeout=storage.connect_timeout_s,
        read_timeout=storage.read_timeout_s,
        retries={"mode": "standard", "total_max_attempts": storage.attempts},
        request_checksum_calculation=storage.checksums,
        max_pool_connections=40,
    )
    session: Any = boto3.Session()
    client = session.client("s3", endpoint_url=storage.endpoint_url, config=config)
    client.meta.events.register("before-sign.s3", _add_headers)
    return Bucket(client, storage.bucket, storage.prefix)


def _add_headers(request: Any, **_: object) -> None:
    for name, value in _to_sign.get().items():
        request.headers[name] = value


@contextmanager
def translate_store_errors(subject: str) -> Generator[None]:
    """Translates boto3's errors into errors that a user can act on."""
    try:
        yield
    except (BotoCoreError, ClientError, S3UploadFailedError) as error:
        if isinstance(error, ClientError) and code_of(error) in MISSING:
            raise blob_missing(subject) from error
        outages.warn(
            "The blob store does not respond as expected", error
        )  # the message must not reveal the store's address
        raise Unavailable(
            "store_unavailable",
            "The blob store does not respond as expected.",
            subject=subject,
            next_step="Try again; if it persists, check the server's log, ADAPTORY_STORAGE__ENDPOINT_URL and __BUCKET, "
            "and the credentials that boto3 finds.",
        ) from error


def code_of(error: ClientError) -> str:
    """The error code in the store's response; empty if it has none."""
    response: Any = error.response
    return str(response.get("Error", {}).get("Code", ""))
