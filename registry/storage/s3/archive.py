"""Backups in a bucket."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from registry.environment.settings import S3Storage
from registry.errors import NotFound
from registry.storage.archive import DOCUMENTS, unknown_document
from registry.storage.blobs import Reader
from registry.storage.s3.bucket import open_bucket, translate_store_errors
from registry.storage.s3.store import Body, S3Store


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
