"""Files in a bucket, read by range."""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from botocore.exceptions import (  # pyright: ignore[reportMissingTypeStubs]
    ClientError,
    ConnectionError,  # noqa: A004 - botocore's own
    HTTPClientError,
    IncompleteReadError,
)

from composer.errors import RefusedOutput
from registry.errors import Invalid, Unavailable
from registry.storage.s3.bucket import MISSING, Bucket, code_of, translate_store_errors

log = logging.getLogger(__name__)

CHANGED = frozenset({"412", "PreconditionFailed", "416", "InvalidRange", *MISSING})
"""Codes of a failed condition: the object was replaced, is shorter, or is gone."""
_BROKEN_OFF = (ConnectionError, HTTPClientError, IncompleteReadError)
_PAUSES_S = (0.2, 1.0, 3.0)
"""The pauses before repeated attempts; boto3's own attempts end with the first byte of the answer."""
_MAX_FILES = 10_000
_PIECE_BYTES = 256 << 10
"""urllib3 first collects a read in memory of its own."""


@dataclass(frozen=True, slots=True)
class S3File:
    """A `StoredFile` pinned to its state at opening: a changed object is refused."""

    bucket: Bucket
    name: str
    size_bytes: int
    etag: str

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fills the buffer in one request, repeated from where it broke off. Raises RefusedOutput if the object was
        changed or removed meanwhile, and Unavailable if the store does not answer."""
        done = 0
        for pause_s in (*_PAUSES_S, None):
            if done == buffer.nbytes:
                return
            try:
                for count in self._read(buffer[done:], offset + done):
                    done += count
            except _BROKEN_OFF:
                if pause_s is None:
                    with translate_store_errors(self.name):
                        raise
                log.warning("Reading %s stopped after %s bytes and is being resumed", self.name, done)
                time.sleep(pause_s)
        if done < buffer.nbytes:
            raise self.changed()

    def _read(self, buffer: memoryview, offset: int) -> Iterator[int]:
        """Yields the number of bytes just read."""
        wanted = f"bytes={offset}-{offset + buffer.nbytes - 1}"
        try:
            answer = self.bucket.client.get_object(**self.named, Range=wanted, IfMatch=self.etag)
        except ClientError as error:
            if code_of(error) in CHANGED:
                raise self.changed() from error
            with translate_store_errors(self.name):
                raise
        body: Any = answer["Body"]
        try:
            if buffer.nbytes < self.size_bytes and not answer.get("ContentRange", "").startswith(f"bytes {offset}-"):
                raise self._without_ranges()
            while buffer.nbytes and (count := body.readinto(buffer[:_PIECE_BYTES])):
                buffer = buffer[count:]
                yield count
        finally:
            body.close()

    def _without_ranges(self) -> Unavailable:
        """The error for a store, or a proxy in front of it, that ignores the requested range."""
        return Unavailable(
            "store_unfit",
            f"The store ignored the requested range of {self.name}.",
            subject=self.name,
            next_step="Use a store that serves ranges of objects. No proxy in front of it may drop the header `Range`.",
        )

    @property
    def named(self) -> dict[str, str]:
        """The object, as arguments of boto3's calls."""
        return self.bucket.object(self.name)

    def refuse_changed(self) -> None:
        """Raises RefusedOutput unless the object is still the one that was opened."""
        if open_file(self.bucket, self.name) != self:
            raise self.changed()

    def changed(self) -> RefusedOutput:
        """The error for an object that has changed since it was opened."""
        return RefusedOutput(
            "inputs_changed", f"{self.name} changed in its bucket since this began.", subject=self.name
        )


def list_files(bucket: Bucket) -> dict[str, int]:
    """The sizes of the objects right below the bucket's prefix. Raises Invalid for more than 10,000."""
    sizes: dict[str, int] = {}
    with translate_store_errors(bucket.name):
        pages = bucket.client.get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=bucket.name, Prefix=bucket.prefix, Delimiter="/"):
            sizes |= {row["Key"].removeprefix(bucket.prefix): row["Size"] for row in page.get("Contents", ())}
            if len(sizes) > _MAX_FILES:
                raise Invalid(
                    "too_large",
                    f"s3://{bucket.name}/{bucket.prefix} has more than {_MAX_FILES:,} objects.",
                    subject=bucket.prefix,
                    next_step="Name the prefix of one checkpoint.",
                )
    return {name: size for name, size in sizes.items() if name}


def open_file(bucket: Bucket, name: str) -> S3File | None:
    """The object of that name below the bucket's prefix; None if it is missing."""
    head = bucket.head(bucket.object(name))
    return S3File(bucket, name, head["ContentLength"], head["ETag"]) if head is not None else None
