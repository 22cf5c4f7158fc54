"""Probes which checks a store makes on direct uploads, using objects of its own: once per store, not per process."""

import hashlib
import logging
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from threading import Lock
from time import monotonic
from types import MappingProxyType
from typing import Any, Protocol

import httpx2
from botocore.exceptions import ClientError  # pyright: ignore[reportMissingTypeStubs]

from registry.environment.settings import S3Storage
from registry.errors import NotFound, Unavailable
from registry.formats.references import Digest
from registry.storage.blobs import IncomingUpload, Put
from registry.storage.s3.bucket import Bucket, code_of, translate_store_errors
from registry.storage.s3.multipart import Parts

log = logging.getLogger(__name__)

NEVER: Mapping[str, str] = MappingProxyType({"X-Delete-After": "9999999999", "X-Delete-At": "9999999999"})
"""Expiry headers that are signed so that a sender cannot choose another expiry. A store that knows them, as Swift does,
takes them for the last moment that it knows (in 2286); other stores ignore them."""
VERSION = 1
"""Raised when the probe changes: facts of another version are not used."""
PROBE = "probe-"
"""The prefix of the upload ids of a probe's own objects."""
STALE_S = 60.0
"""An object of a probe older than this was left by a killed process."""
FAILED_S = 5.0
"""The pause after a probe that the store did not answer, also stated in `Retry-After`."""
NOT_IMPLEMENTED = 501
"""The status with which some stores refuse an unknown header."""
_SOON = "60"
_RIGHT, _WRONG = b"right", b"wrong"
_CONDITION_FAILED = {"412", "PreconditionFailed"}

Headers = Iterable[tuple[str, str]]
SignedPut = Callable[[IncomingUpload, dict[str, str], int, Mapping[str, str]], Put]
"""Signs a request for an object: valid for some seconds, with further headers signed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreFacts:
    """The checks that a store was seen to make.

    `bodies`: it refuses a body of another sha256 than the signed one. `signed_end`: it accepts the right body with the
    signed `NEVER`, and with no other expiry. `parts`: it refuses a part of another sha256 than the signed one; None if
    it accepts no uploads in parts at all.
    """

    bodies: bool
    signed_end: bool
    parts: bool | None


class FactsRecord(Protocol):
    """The shared record of the facts about one store, for all processes."""

    def load(self) -> StoreFacts | None: ...
    def save(self, facts: StoreFacts) -> None: ...
    def lock(self) -> AbstractContextManager[None]:
        """Held by one process at a time."""
        ...


class StoreProbe:
    """`incoming` names the object of an upload that is not yet verified. Without a `record` each process probes."""

    def __init__(
        self,
        bucket: Bucket,
        storage: S3Storage,
        signed_put: SignedPut,
        parts: Parts,
        incoming: Callable[[IncomingUpload], dict[str, str]],
        record: FactsRecord | None = None,
    ) -> None:
        self._bucket, self._storage, self._record = bucket, storage, record
        self._signed_put, self._parts, self._incoming = signed_put, parts, incoming
        self._facts: StoreFacts | None = None
        self._lock = Lock()
        self._failed: tuple[float, Unavailable] | None = None

    def facts(self) -> StoreFacts:
        """The recorded facts; probes the store if there are none.

        Raises Unavailable if the store does not answer, or ignores the condition of a copy. Callers that waited for a
        failed probe fail with it: retrying one after the other would block a thread of the server each time.
        """
        if self._facts is None:
            with self._lock:
                if self._failed and monotonic() < self._failed[0]:
                    raise self._failed[1]
                try:
                    self._facts = self._facts or self._recorded()
                except Unavailable as error:
                    self._failed = (monotonic() + FAILED_S, error)
                    raise
        return self._facts

    def probe(self) -> StoreFacts:
        """Probes the store now, and records what it finds."""
        with self._record.lock() if self._record else nullcontext():
            self._facts = self._probe_and_save()
            return self._facts

    def checks_bodies(self) -> bool:
        """Whether bytes that the store accepted under a signed request need no second check."""
        return self.facts().bodies and not self._storage.hash_arrivals

    def allows_in_place(self) -> bool:
        """Whether a request for a blob's own key serves for its bytes and for nothing else."""
        if not self.checks_bodies():
            return False
        allowed = self._storage.direct
        return self.facts().signed_end if allowed == "auto" else allowed

    def checks_parts(self) -> bool:
        """Raises Unavailable for a store that accepts no uploads in parts."""
        checks = self.facts().parts
        if checks is None:
            raise Unavailable(
                "store_unavailable",
                "The blob store refuses multipart uploads.",
                next_step="Check the store, then run `adaptory storage check`.",
            )
        return checks

    def _recorded(self) -> StoreFacts:
        if self._record is None:
            return self._probe_and_save()
        if known := self._record.load():
            return known
        with self._record.lock():
            return self._record.load() or self._probe_and_save()

    def _probe_and_save(self) -> StoreFacts:
        bodies = self._tells_bodies_apart()
        facts = StoreFacts(
            bodies=bodies, signed_end=bodies and self._holds_to_the_signed_end(), parts=self._tells_parts_apart()
        )
        log.info("The blob store verifies: %s", facts)
        if self._record is not None and facts.parts is not None:  # a store may be upgraded to accept parts
            self._record.save(facts)
        return facts

    def _holds_to_the_signed_end(self) -> bool:
        probe = _probe()
        put = self._signed_put(probe, self._incoming(probe), 60, NEVER)
        try:
            if not self._accepts(put.url, _RIGHT, put.headers.items()):
                return False  # a proxy removes signed headers
            return not any(self._accepts(put.url, _RIGHT, other) for other in _with_another_end(put.headers))
        finally:
            self._remove(probe)

    def _remove(self, probe: IncomingUpload) -> None:
        with translate_store_errors(self._bucket.name):
            self._bucket.client.delete_object(**self._incoming(probe))

    def _takes(self, probe: IncomingUpload, body: bytes) -> bool:
        """Whether the store accepts the body, sent as a client would send it."""
        put = self._signed_put(probe, self._incoming(probe), 60, {})
        return self._accepts(put.url, body, put.headers.items())

    def _accepts(self, url: str, body: bytes, headers: Headers) -> bool:
        try:
            answer = httpx2.put(url, content=body, headers=list(headers), timeout=self._storage.read_timeout_s)
        except httpx2.TransportError as error:
            log.warning("The blob store does not answer: %s", error)
            raise Unavailable("store_unavailable", "The blob store does not answer.") from error
        if answer.status_code >= 500 and answer.status_code != NOT_IMPLEMENTED:
            raise Unavailable("store_unavailable", f"The blob store answers {answer.status_code}.")
        return answer.status_code < 300

    def _tells_bodies_apart(self) -> bool:
        """Whether the store refuses wrong bytes. Raises Unavailable if it refuses right ones, or ignores the condition
        of a copy."""
        probe = _probe()
        copy = replace(probe, upload_id=f"{probe.upload_id}-copy")
        refuses = not self._takes(probe, _WRONG)
        try:
            conditional = self._takes(probe, _RIGHT) and "ETag" in (self._bucket.head(self._incoming(probe)) or {})
            if not conditional or self._copies_whatever_the_condition(probe, copy):
                raise Unavailable(
                    "store_unfit",
                    "The blob store does not support conditional copies (ETag, CopySourceIfMatch), so an upload could "
                    "be replaced after it was checked.",
                )
        finally:
            self._remove(probe)
            self._remove(copy)
        return refuses

    def _tells_parts_apart(self) -> bool | None:
        """Whether it refuses wrong parts. None if it accepts no parts of either kind."""
        if self._joins_right_parts(_probe(), checked=True):
            return True
        return False if self._joins_right_parts(_probe(), checked=False) else None

    def _joins_right_parts(self, probe: IncomingUpload, *, checked: bool) -> bool:
        """Whether it joins right parts and, if they are `checked`, refuses wrong ones."""
        named = self._incoming(probe)
        upload: dict[str, str] | None = None
        try:
            with translate_store_errors(self._bucket.name):
                upload = {**named, "UploadId": self._parts.begin(named, checked=checked)}
                if not self._takes_right_part(upload, probe, checked=checked):
                    return False
                self._parts.join(upload, self._parts.stored(upload) or {})
                upload = None
            return self._bucket.head(named) is not None
        except (NotFound, Unavailable) as error:
            if isinstance(error.__cause__, ClientError) and is_refusal(error.__cause__):
                return False
            raise
        finally:
            with translate_store_errors(self._bucket.name):
                if upload is not None:
                    self._parts.abort(upload)
            self._remove(probe)

    def _takes_right_part(self, upload: dict[str, str], probe: IncomingUpload, *, checked: bool) -> bool:
        put = self._parts.put(upload, 1, probe.size_bytes, probe.sha256 if checked else None, 60)
        if checked and self._accepts(put.url, _WRONG, put.headers.items()):
            return False
        return self._accepts(put.url, _RIGHT, put.headers.items())

    def _copies_whatever_the_condition(self, probe: IncomingUpload, copy: IncomingUpload) -> bool:
        source, target = self._incoming(probe), self._incoming(copy)
        with translate_store_errors(self._bucket.name):
            try:
                self._bucket.client.copy_object(**target, CopySource=source, CopySourceIfMatch='"another"')
            except ClientError as error:
                if code_of(error) not in _CONDITION_FAILED:
                    raise
                return False
        return True


def status_of(error: ClientError) -> int:
    """The HTTP status of the store's response; 500 without one."""
    response: Any = error.response
    return response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500)


def is_refusal(error: ClientError) -> bool:
    """Distinguishes a store that refuses from one that fails."""
    return status_of(error) < 500 or status_of(error) == NOT_IMPLEMENTED


def _with_another_end(headers: Mapping[str, str]) -> Iterator[Headers]:
    """The headers with another expiry: in place of the signed one, before it, after it, or none."""
    signed = [row for row in headers.items() if row[0] in NEVER]
    others = [row for row in headers.items() if row[0] not in NEVER]
    soon = [(name, _SOON) for name in NEVER]
    for end in (soon, soon + signed, signed + soon, []):
        yield others + end


def _probe() -> IncomingUpload:
    return IncomingUpload(f"{PROBE}{uuid.uuid4().hex}", Digest(hashlib.sha256(_RIGHT).hexdigest()), len(_RIGHT))
