"""How far a store may be trusted with what others send it: tried by each process, on objects of its own."""

import atexit
import hashlib
import logging
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from threading import Lock, Timer

import httpx2
from botocore.exceptions import ClientError  # pyright: ignore[reportMissingTypeStubs]

from registry.errors import Unavailable
from registry.names import Digest
from registry.settings import S3Storage
from registry.storage.blobs import Arrival, Put
from registry.storage.s3_bucket import Bucket, code_of, told

log = logging.getLogger(__name__)

SETTLED_S = 10.0
"""So long after an object should have ended, a store that meant to end it has."""
PROBE = "probe-"
"""What the ids of a trial's own arrivals begin with."""
STALE_S = 60.0
"""An object of a trial that is older was left by a process that was killed."""
_ENDS_SOON = {"X-Delete-After": "1"}
_RIGHT, _WRONG = b"right", b"wrong"
_CONDITION_FAILED = {"412", "PreconditionFailed"}

SignedPut = Callable[[Arrival, dict[str, str], int], Put]
"""The request that a sender gets for an object, good for so many seconds."""


class Trial:
    """`aside` names the object where an arrival waits; `clock` counts seconds."""

    def __init__(
        self,
        bucket: Bucket,
        storage: S3Storage,
        signed_put: SignedPut,
        aside: Callable[[Arrival], dict[str, str]],
        clock: Callable[[], float],
    ) -> None:
        self._bucket, self._storage = bucket, storage
        self._signed_put, self._aside, self._clock = signed_put, aside, clock
        self._checks: bool | None = None
        self._in_place = None if storage.direct == "auto" else storage.direct
        self._ending: Arrival | None = None
        self._look_at = clock() + SETTLED_S
        self._lock = Lock()

    def checks_bodies(self) -> bool:
        """Whether the store refuses a body of another sha256 than the signed one. Raises Unavailable for a store that
        copies whatever the condition."""
        with self._lock:
            if self._checks is None:
                refuses, copies = self._try(_probe())
                if copies:
                    raise Unavailable(
                        "store_unfit",
                        "The blob store does not copy on a condition (CopySourceIfMatch), so that an upload could be "
                        "exchanged after it was checked.",
                        next_step="Use a store that does, such as AWS S3, Ceph, Swift or JuiceFS.",
                    )
                self._checks = refuses and not self._storage.hash_arrivals
            return self._checks

    def allows_in_place(self) -> bool:
        """Whether a request for a blob's own key serves for its bytes and for nothing else.

        Where the settings leave it open: once an object that was sent with an end, in a header that was not signed, has
        outlived that end. A store need not show ends, so the object is waited for, by a process that lives long enough;
        it goes as soon as that is known, or with the process.
        """
        if not self.checks_bodies():
            return False
        with self._lock:
            if self._in_place is None and self._clock() >= self._look_at:
                self._look_at = self._clock() + SETTLED_S
                self._in_place = self._ignores_ends()
            return bool(self._in_place)

    def _ignores_ends(self) -> bool | None:
        """None when it has only now been asked."""
        if self._ending is None:
            ending = _probe()
            if not self._takes(ending, _RIGHT, _ENDS_SOON):
                return True
            self._ending = ending
            atexit.register(self._leave)
            timer = Timer(SETTLED_S, self._look)
            timer.daemon = True
            timer.start()
            return None
        outlived = self._bucket.head(self._aside(self._ending)) is not None
        self._remove(self._ending)
        atexit.unregister(self._leave)
        return outlived

    def _look(self) -> None:
        """Also when nobody sends anything more."""
        with suppress(Unavailable), self._lock:  # it is in the log, and the next file asks again
            if self._in_place is None:
                self._in_place = self._ignores_ends()

    def _leave(self) -> None:
        """Before its time, so that it says nothing."""
        if self._ending is not None:
            with suppress(Unavailable):  # it is in the log, and a collection will remove it
                self._remove(self._ending)

    def _remove(self, probe: Arrival) -> None:
        with told(self._bucket.name):
            self._bucket.client.delete_object(**self._aside(probe))

    def _takes(self, probe: Arrival, body: bytes, more: Mapping[str, str] | None = None) -> bool:
        """Sent as a client would send it."""
        put = self._signed_put(probe, self._aside(probe), 60)
        headers = {**put.headers, **(more or {})}
        try:
            answer = httpx2.put(put.url, content=body, headers=headers, timeout=self._storage.read_timeout_s)
        except httpx2.TransportError as error:
            log.warning("The blob store does not answer: %s", error)
            raise Unavailable("store_unavailable", "The blob store does not answer.", next_step="Try again.") from error
        if answer.status_code >= 500:
            raise Unavailable(
                "store_unavailable", f"The blob store answers {answer.status_code}.", next_step="Try again."
            )
        return answer.status_code < 300

    def _try(self, probe: Arrival) -> tuple[bool, bool]:
        """Whether it refuses wrong bytes, and whether it fails to take the right ones or copies them regardless."""
        copy = replace(probe, upload_id=f"{probe.upload_id}-copy")
        refuses = not self._takes(probe, _WRONG)
        try:
            return refuses, not self._takes(probe, _RIGHT) or self._copies_whatever_the_condition(probe, copy)
        finally:
            self._remove(probe)
            self._remove(copy)

    def _copies_whatever_the_condition(self, probe: Arrival, copy: Arrival) -> bool:
        source, target = self._aside(probe), self._aside(copy)
        with told(self._bucket.name):
            try:
                self._bucket.client.copy_object(**target, CopySource=source, CopySourceIfMatch='"another"')
            except ClientError as error:
                if code_of(error) not in _CONDITION_FAILED:
                    raise
                return False
        return True


def _probe() -> Arrival:
    return Arrival(f"{PROBE}{uuid.uuid4().hex}", Digest(hashlib.sha256(_RIGHT).hexdigest()), len(_RIGHT))
