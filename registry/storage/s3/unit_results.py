"""Results of units of work as objects under `work/`."""

from datetime import datetime
from typing import Any

from botocore.exceptions import ClientError  # pyright: ignore[reportMissingTypeStubs]

from registry.storage.s3.bucket import MISSING, Bucket, code_of, translate_store_errors
from registry.storage.unit_results import MAX_RESULT_BYTES, WORK


class S3Results:
    """One object per result: S3 shows an object completely or not at all."""

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
