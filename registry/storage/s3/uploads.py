"""Uploads that clients send to S3 directly, by requests that the registry signs and whose results it checks."""

import hashlib
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from registry.environment.settings import S3Storage
from registry.errors import Conflict, Invalid, Unavailable
from registry.formats.references import Digest
from registry.storage.blobs import BlobStat, IncomingUpload, Part, Put
from registry.storage.s3.bucket import NO_HEADERS, Bucket, ObjectHead, translate_store_errors
from registry.storage.s3.multipart import Parts, checksum
from registry.storage.s3.probe import NEVER, PROBE, STALE_S, FactsRecord, StoreProbe
from registry.storage.s3.writer import INCOMING, LARGE_COPY

UNCHECKED = ".lfs"
"""Suffix of the key of an upload that comes without headers."""
CHECKED = "sha256:"
"""Prefix of the `multipart_id` of an upload whose parts come with their sha256: all of them do, or none."""
_MAX_PARTS = 10_000
_MIB = 1 << 20
_BLOCK_BYTES = 1 << 20


class Arrived(ObjectHead):
    """An upload's object, and whether it is still the incoming one."""

    incoming: bool


class S3Arrivals:
    """Direct uploads to S3.

    A file in one request goes straight to the key of its blob if the store refuses a body of another sha256 and a
    signed request cannot be used for anything else, as determined by `StoreProbe` or the settings.

    A client can repeat such a request with the same bytes, and on Swift could set an expiry on a blob that others rely
    on by then, by adding a header (`X-Delete-After`). That header is therefore signed, with a time in the remote future
    (`NEVER`).

    Everything else goes to `incoming/` and is read back, hashed and copied: files that clients send without headers;
    files in parts, whose total SHA-256 no store knows; files of an existing blob, since the sender must prove to have
    the bytes and must not touch the blob; and all files if the store does not verify.
    """

    def __init__(
        self,
        bucket: Bucket,
        storage: S3Storage,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        record: FactsRecord | None = None,
    ) -> None:
        self._bucket, self._storage, self._now = bucket, storage, now
        self._client: Any = bucket.client
        self._parts = Parts(bucket)
        self.probe = StoreProbe(bucket, storage, self._put_of, self._parts, self._incoming, record)

    def part_bytes(self, size_bytes: int) -> int | None:
        if size_bytes < self._storage.multipart_bytes:
            return None
        least = -(-size_bytes // _MAX_PARTS)
        return max(self._storage.part_bytes, -(-least // _MIB) * _MIB)

    def begin(self, arrival: IncomingUpload) -> str:
        checked = self.probe.checks_parts() and not arrival.unchecked
        with translate_store_errors(arrival.sha256):
            return (CHECKED if checked else "") + self._parts.begin(self._incoming(arrival), checked=checked)

    def sign_object(self, arrival: IncomingUpload, expires_s: int, *, sent_before: bool, known: bool) -> Put | None:
        if sent_before and self._arrived(arrival) is not None:
            return None
        if arrival.unchecked:
            params = {**self._incoming(arrival), "ContentLength": arrival.size_bytes}
            url = self._bucket.signed_url("put_object", params, expires_s)
            return Put(url, {"Content-Length": str(arrival.size_bytes)})
        if not known and self.probe.allows_in_place():
            return self._put_of(arrival, self._bucket.blob(arrival.sha256), expires_s, NEVER)
        return self._put_of(arrival, self._incoming(arrival), expires_s)

    def parts(self, arrival: IncomingUpload) -> list[Part] | None:
        with translate_store_errors(arrival.sha256):
            there = self._parts.stored(self._upload(arrival))
        if there is None:
            return None if self._bucket.head(self._incoming(arrival)) is None else []
        return [
            Part(number, size, present=number in there and there[number]["Size"] == size)
            for number, size in enumerate(arrival.part_sizes, start=1)
        ]

    def sign_part(self, arrival: IncomingUpload, number: int, sha256: Digest, expires_s: int) -> Put:
        signed = sha256 if (arrival.multipart_id or "").startswith(CHECKED) else None
        size = arrival.part_sizes[number - 1]
        return self._parts.put(self._upload(arrival), number, size, signed, expires_s)

    def finish(self, arrival: IncomingUpload) -> BlobStat:
        if arrival.multipart_id is not None:
            self._join_parts(arrival)
        arrived = self._arrived(arrival)
        if arrived is not None and arrived["ContentLength"] != arrival.size_bytes:
            self.discard(arrival)
            raise _differs(arrival, f"has {arrived['ContentLength']:,} bytes, not {arrival.size_bytes:,}")
        if arrived is not None and arrived["incoming"]:
            self._accept(arrival, arrived["ETag"])
        head = self._bucket.head(self._bucket.blob(arrival.sha256))
        # If nothing arrived, the upload may have become the blob already: a copy keeps the id of its upload.
        if head is None or (arrived is None and _upload_of(head) != arrival.upload_id):
            raise _incomplete(arrival)
        return BlobStat(arrival.sha256, head["ContentLength"], head["LastModified"])

    def abandon(self, arrival: IncomingUpload) -> None:
        with translate_store_errors(arrival.sha256):
            if arrival.multipart_id is not None:
                self._parts.abort(self._upload(arrival))

    def discard(self, arrival: IncomingUpload) -> None:
        self.abandon(arrival)
        with translate_store_errors(arrival.sha256):
            self._client.delete_object(**self._incoming(arrival))

    def sweep(self, before: datetime, keep: Collection[str]) -> int:
        """Also ends our own uploads in parts, and removes objects left by the probe of a killed process."""
        removed, probes_before = 0, self._now() - timedelta(seconds=STALE_S)

        def is_left(key: str, since: datetime) -> bool:
            upload_id = key.rpartition("/")[2].removesuffix(UNCHECKED)
            return since < (probes_before if upload_id.startswith(PROBE) else before) and upload_id not in keep

        with translate_store_errors(self._bucket.name):
            for row in self._bucket.listed(INCOMING):
                if is_left(row["Key"], row["LastModified"]):
                    self._client.delete_object(Bucket=self._bucket.name, Key=row["Key"])
                    removed += 1
            pages = self._client.get_paginator("list_multipart_uploads")
            for page in pages.paginate(Bucket=self._bucket.name, Prefix=self._bucket.prefix):
                for row in page.get("Uploads", ()):
                    if is_left(row["Key"], row["Initiated"]):
                        self._parts.abort({"Bucket": self._bucket.name, "Key": row["Key"], "UploadId": row["UploadId"]})
                        removed += 1
        return removed

    def _incoming(self, arrival: IncomingUpload) -> dict[str, str]:
        return self._bucket.object(f"{INCOMING}{arrival.upload_id}{UNCHECKED if arrival.unchecked else ''}")

    def _upload(self, arrival: IncomingUpload) -> dict[str, str]:
        return {**self._incoming(arrival), "UploadId": (arrival.multipart_id or "").removeprefix(CHECKED)}

    def _put_of(
        self, arrival: IncomingUpload, named: dict[str, str], expires_s: int, more: Mapping[str, str] = NO_HEADERS
    ) -> Put:
        """Signs the request that sends the object. Length, sha256, the upload and the headers `more` are signed, so the
        request serves for these bytes only."""
        sha256 = checksum(arrival.sha256)
        params = {
            **named,
            "ContentLength": arrival.size_bytes,
            "ChecksumSHA256": sha256,
            "Metadata": {"upload": arrival.upload_id},
        }
        url = self._bucket.signed_url("put_object", params, expires_s, more)
        headers = {"x-amz-checksum-sha256": sha256, "x-amz-meta-upload": arrival.upload_id, **more}
        return Put(url, {"Content-Length": str(arrival.size_bytes), **headers})

    def _arrived(self, arrival: IncomingUpload) -> Arrived | None:
        """The incoming object, or the blob itself if this upload wrote it."""
        head = self._bucket.head(self._incoming(arrival))
        if head is not None:
            return {**head, "incoming": True}
        if arrival.unchecked:
            return None
        head = self._bucket.head(self._bucket.blob(arrival.sha256))
        if head is not None and _upload_of(head) == arrival.upload_id and self.probe.checks_bodies():
            return {**head, "incoming": False}
        return None

    def _join_parts(self, arrival: IncomingUpload) -> None:
        with translate_store_errors(arrival.sha256):
            there = self._parts.stored(self._upload(arrival))
        if there is None:  # already joined, or never begun: the incoming object shows which
            return
        if [there[number]["Size"] for number in sorted(there)] != arrival.part_sizes:
            raise _incomplete(arrival)
        with translate_store_errors(arrival.sha256):
            self._parts.join(self._upload(arrival), there)

    def _accept(self, arrival: IncomingUpload, etag: str) -> None:
        """Copies exactly the bytes that were hashed: the holder of the signed request could write again meanwhile."""
        if arrival.unchecked or arrival.multipart_id is not None or not self.probe.checks_bodies():
            self._check_digest(arrival, etag)
        named = self._bucket.blob(arrival.sha256)
        if self._bucket.head(named) is not None:
            return
        condition = {
            "CopySourceIfMatch": etag,
            "MetadataDirective": "REPLACE",
            "Metadata": {"upload": arrival.upload_id},
        }
        with translate_store_errors(arrival.sha256):
            self._client.copy(
                self._incoming(arrival), named["Bucket"], named["Key"], ExtraArgs=condition, Config=LARGE_COPY
            )

    def _check_digest(self, arrival: IncomingUpload, etag: str) -> None:
        """Raises Invalid if the upload has another digest. Reads it once more first, in case of a single wrong read."""
        read = self._digest(arrival, etag)
        if read != arrival.sha256 and (again := self._digest(arrival, etag)) != arrival.sha256:
            if again != read:
                raise Unavailable(
                    "store_unavailable",
                    f"The store returns different bytes of the upload of {arrival.sha256} on each read.",
                    subject=arrival.sha256,
                )
            self.discard(arrival)
            raise _differs(arrival, f"has the sha256 {read}")

    def _digest(self, arrival: IncomingUpload, etag: str) -> str:
        digest = hashlib.sha256()
        with translate_store_errors(arrival.sha256):
            body = self._client.get_object(**self._incoming(arrival), IfMatch=etag)["Body"]
            while block := body.read(_BLOCK_BYTES):
                digest.update(block)
        return digest.hexdigest()


def _upload_of(head: ObjectHead) -> str | None:
    """The upload id in an object's metadata. Some stores return metadata names in another case."""
    return {name.lower(): value for name, value in head["Metadata"].items()}.get("upload")


def _incomplete(arrival: IncomingUpload) -> Conflict:
    return Conflict("upload_incomplete", f"{arrival.sha256} has not completely arrived.", subject=arrival.sha256)


def _differs(arrival: IncomingUpload, what: str) -> Invalid:
    return Invalid("digest_differs", f"The upload of {arrival.sha256} {what}.", subject=arrival.sha256)
