"""Uploads in parts, each part by a request of its own."""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from botocore.exceptions import ClientError  # pyright: ignore[reportMissingTypeStubs]

from registry.formats.references import Digest
from registry.storage.blobs import Put
from registry.storage.s3.bucket import Bucket, code_of

Stored = Mapping[int, Mapping[str, Any]]
"""Maps part numbers to the store's records of received parts."""
_FORGOTTEN = {"NoSuchUpload", "404", "NoSuchKey"}  # Ceph answers NoSuchKey for parts
_NAMING = ("ETag", "ChecksumSHA256")
"""The fields that identify a part when it is joined. AWS lists the sha256 of parts that came with one, and requires it
here."""


def checksum(sha256: Digest) -> str:
    """A sha256 in S3's form."""
    return base64.b64encode(bytes.fromhex(sha256)).decode()


class Parts:
    """Operations on parts. `upload` names the resulting object and, as `UploadId`, the upload: boto3's parameters.

    Raises botocore's errors, except for an upload that is gone: another request has joined or ended it meanwhile.
    """

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket

    def begin(self, named: dict[str, str], *, checked: bool) -> str:
        """Begins an upload to the object `named` and returns its id. `checked`: every part comes with its sha256. AWS
        requires this to be announced at the beginning, and then accepts no other parts."""
        how = {"ChecksumAlgorithm": "SHA256"} if checked else {}
        return self._bucket.client.create_multipart_upload(**named, **how)["UploadId"]

    def put(self, upload: dict[str, str], number: int, size_bytes: int, sha256: Digest | None, expires_s: int) -> Put:
        """Signs the request that sends a part. Its number and length are signed, and its sha256 if the upload is
        `checked`."""
        params = {**upload, "PartNumber": number, "ContentLength": size_bytes}
        headers = {"Content-Length": str(size_bytes)}
        if sha256 is not None:
            params["ChecksumSHA256"] = headers["x-amz-checksum-sha256"] = checksum(sha256)
        return Put(self._bucket.signed_url("upload_part", params, expires_s), headers)

    def stored(self, upload: dict[str, str]) -> Stored | None:
        """The received parts. None if the store does not know the upload: it was joined, ended or
        forgotten.
        """
        parts: dict[int, dict[str, Any]] = {}
        try:
            for page in self._bucket.client.get_paginator("list_parts").paginate(**upload):
                parts |= {row["PartNumber"]: row for row in page.get("Parts", ())}
        except ClientError as error:
            if code_of(error) in _FORGOTTEN:
                return None
            raise
        return parts

    def join(self, upload: dict[str, str], there: Stored, naming: Sequence[str] = _NAMING) -> None:
        """Assembles the parts; does nothing if the upload is already completed. `naming` are the fields that identify
        a part."""
        parts = [
            {"PartNumber": number, **{key: there[number][key] for key in naming if key in there[number]}}
            for number in sorted(there)
        ]
        try:
            self._bucket.client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})
        except ClientError as error:
            if code_of(error) not in _FORGOTTEN:
                raise

    def abort(self, upload: dict[str, str]) -> None:
        """Discards the parts; does nothing if the upload no longer exists."""
        try:
            self._bucket.client.abort_multipart_upload(**upload)
        except ClientError as error:
            if code_of(error) not in _FORGOTTEN:
                raise
