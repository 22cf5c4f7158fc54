"""Limits of one call of a hub: the size and time of its answers, and the host that gets this user's token.

`huggingface_hub` has no such limits. Its calls in a process share an HTTP client: hooks there recognise a call by its
request id, and leave the calls of other programs alone.
"""

import importlib
import re
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

from registry.errors import Refused, Unavailable

DOCUMENTS_BYTES = 16 << 20
"""Maximum size of all documents of a call: a listing of 50,000 files."""
DOCUMENTS_S, READ_S = 120.0, 30.0
"""How long a call may take without files, and how long it waits for the next bytes."""
SLOWEST_BYTES_PER_S = 32 << 10
"""The time that files may take in addition."""
_SLACK_BYTES = 1 << 20
_REQUEST_ID = "X-Request-Id"
_WAIT = re.compile(r"\bt\s*=\s*(\d{1,9})")


@dataclass(slots=True)
class CallLimits:
    """The remaining limits of a call of the hub at `endpoint` about `what`; `ends` is monotonic time."""

    endpoint: str
    what: str
    ends: float
    documents_bytes: int
    files_bytes: int
    check: Callable[[], None]

    def check_time(self, wait_s: float = 0) -> None:
        """Raises Unavailable if waiting `wait_s` would exceed the limit, and the errors of `check`."""
        self.check()
        if time.monotonic() + wait_s > self.ends:
            message = f"{self.endpoint} takes too long to answer about {self.what}."
            raise Unavailable("hub_unavailable", message, subject=self.what)

    def spend(self, size_bytes: int, *, document: bool) -> None:
        """Raises Refused for more bytes than remain."""
        if document:
            self.documents_bytes -= size_bytes
        else:
            self.files_bytes -= size_bytes
        if self.documents_bytes < 0 or self.files_bytes < 0:
            raise self.refused("answers with more bytes than " + ("a listing has" if document else "it lists"))

    def refused(self, why: str) -> Refused:
        next_step = "Check that HF_ENDPOINT is a hub, and ask its operator."
        return Refused(
            "hub_refused", f"{self.endpoint} {why}, about {self.what}.", subject=self.what, next_step=next_step
        )


_in_force: dict[str, CallLimits] = {}
_installing = threading.Lock()


@contextmanager
def limited(
    endpoint: str, what: str, files_bytes: int = 0, check: Callable[[], None] = lambda: None
) -> Generator[dict[str, str]]:
    """Limits the requests that have the yielded headers. `files_bytes` is the size of the files that are sent or
    received, each perhaps twice: a download that is interrupted may begin again. `check` is called often, also in other
    threads, and ends the call by raising."""
    http = importlib.import_module("huggingface_hub.utils._http")
    with _installing:
        if not isinstance(http._GLOBAL_CLIENT_FACTORY, _LimitedFactory):
            http.set_client_factory(_LimitedFactory(http._GLOBAL_CLIENT_FACTORY))
    request_id = str(uuid4())
    ends = time.monotonic() + DOCUMENTS_S + files_bytes / SLOWEST_BYTES_PER_S
    _in_force[request_id] = CallLimits(endpoint, what, ends, DOCUMENTS_BYTES, 2 * files_bytes + _SLACK_BYTES, check)
    try:
        yield {_REQUEST_ID: request_id}
    finally:
        del _in_force[request_id]


@dataclass(frozen=True, slots=True)
class _LimitedFactory:
    """Makes the clients of another factory, with hooks."""

    factory: Any

    def __call__(self) -> Any:
        client = self.factory()
        client.event_hooks["request"].append(_before)
        client.event_hooks["response"].append(_after)
        return client


def _before(request: Any) -> None:
    limits = _in_force.get(request.headers.get(_REQUEST_ID, ""))
    if limits is None:
        return
    limits.check_time()
    url = str(request.url)
    if "authorization" in request.headers and _origin(url) != _origin(limits.endpoint):
        raise limits.refused(f"sends the user's token on to {request.url.host}")
    request.headers["Accept-Encoding"] = "identity"  # a few bytes may otherwise become gigabytes
    timeouts = request.extensions.get("timeout", {})
    request.extensions["timeout"] = {
        name: min(timeouts.get(name) or READ_S, READ_S) for name in ("connect", "read", "write", "pool")
    }


def _after(response: Any) -> None:
    limits = _in_force.get(response.request.headers.get(_REQUEST_ID, ""))
    if limits is None:
        return
    if response.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise limits.refused("answers in an encoding that was not accepted")
    for wait in (*_WAIT.findall(response.headers.get("ratelimit", "")), response.headers.get("retry-after", "")):
        if wait.isdecimal():
            limits.check_time(int(wait[:9]))
    document = str(response.request.url).startswith(f"{limits.endpoint}/api/")
    response.stream = _bounded_stream()(response.stream, limits, document)


@cache
def _bounded_stream() -> type[Any]:
    """The class of bounded bodies, derived from the one of the HTTP library that the hub's client uses."""
    from huggingface_hub import errors

    library = importlib.import_module(errors.HfHubHTTPError.__bases__[0].__module__.partition(".")[0])

    class Bounded(library.SyncByteStream):
        def __init__(self, stream: Any, limits: CallLimits, document: bool) -> None:
            self._stream, self._limits, self._document = stream, limits, document

        def __iter__(self) -> Iterator[bytes]:
            for chunk in self._stream:
                self._limits.check_time()
                self._limits.spend(len(chunk), document=self._document)
                yield chunk

        def close(self) -> None:
            self._stream.close()

    return Bounded


def _origin(url: str) -> tuple[str, str, int]:
    parts = urlsplit(url)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or {"https": 443}.get(parts.scheme, 80)
