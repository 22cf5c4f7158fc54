"""The keys of issuers of ID tokens: found by OpenID Connect's discovery, cached, and fetched anew for an unknown key.

Only issuers that the operator names are contacted. No redirect is followed, the keys are on the issuer's own host, and
time and size are bounded, so that neither a token nor an issuer makes the server call anything else. The issuer that
signs users in is trusted with more, and may have its keys on another host."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, cast
from urllib.parse import urlsplit

import httpx2
import orjson

from registry.errors import Unavailable
from registry.formats.id_tokens import KEY_TYPES, invalid

MAX_AGE_S = 3600
"""How long keys are cached, and thus how late a withdrawn one is noticed."""
MIN_INTERVAL_S = 60
"""The shortest time between two fetches: tokens with invented keys cause no further ones."""
RETRY_S = 10
"""The same after a failed fetch."""
MAX_BYTES = 256 << 10
MAX_KEYS = 100
FETCH_S = 10
_STEP_S = 5
_WITH_OBJECT = (200, 400, 401)
"""The statuses of answers that are read: errors of a token endpoint carry a description (RFC 6749, 5.2)."""


@dataclass(slots=True)
class _Known:
    """An issuer's discovery document, and its keys by id. `error` is the reason why the last fetch failed."""

    lock: Lock = field(default_factory=Lock)
    description: Mapping[str, Any] = field(default_factory=dict[str, Any])
    keys: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    fetched_at: float = float("-inf")
    tried_at: float = float("-inf")
    error: str | None = None


@dataclass(slots=True)
class IssuerKeys:
    """Caches the keys of each issuer. Threads that need the same issuer's keys wait for one fetch."""

    clock: Callable[[], float] = time.monotonic
    own_host: bool = True
    """Whether keys must be on the issuer's own host."""
    _known: dict[str, _Known] = field(default_factory=dict[str, _Known])

    def find(self, issuer: str, key_id: str) -> Mapping[str, Any]:
        """The issuer's key with that id. Raises Unauthenticated if the issuer has none, and Unavailable if it cannot be
        reached."""
        known = self._known.setdefault(issuer, _Known())
        if (key := self._fresh(known).get(key_id)) is not None:
            return key
        with known.lock:
            if key_id not in self._fresh(known):
                self._fetch(issuer, known)
            key, error = self._fresh(known).get(key_id), known.error
        if key is not None:
            return key
        if error is not None:
            raise unavailable(issuer, f"the keys of {issuer} cannot be fetched: {error}")
        raise invalid(f"{issuer} has no such key")

    def describe(self, issuer: str) -> Mapping[str, Any]:
        """The issuer's discovery document: its addresses. Raises Unavailable if it cannot be reached."""
        known = self._known.setdefault(issuer, _Known())
        with known.lock:
            if not self._is_fresh(known):
                self._fetch(issuer, known)
            if not self._is_fresh(known):
                raise unavailable(issuer, f"{issuer} has no usable discovery document: {known.error}")
            return known.description

    def _fresh(self, known: _Known) -> Mapping[str, Mapping[str, Any]]:
        return known.keys if self._is_fresh(known) else {}

    def _is_fresh(self, known: _Known) -> bool:
        return self.clock() - known.fetched_at < MAX_AGE_S

    def _fetch(self, issuer: str, known: _Known) -> None:
        """Fetches the keys, unless that was tried a moment ago."""
        if self.clock() - known.tried_at < (RETRY_S if known.error else MIN_INTERVAL_S):
            return
        known.tried_at = self.clock()
        try:
            known.description, known.keys = _fetch_keys(issuer, own_host=self.own_host)
        except FETCH_ERRORS as error:
            known.error = reason(error)
        else:
            known.fetched_at, known.error = self.clock(), None


FETCH_ERRORS = (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError)
"""The errors of a request to an issuer: it cannot be reached, or its answer is invalid."""


def reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def unavailable(issuer: str, why: str) -> Unavailable:
    """The error for an issuer that cannot be reached; `why` is a sentence without its end."""
    return Unavailable("issuer_unavailable", f"{why[:1].upper()}{why[1:]}.", subject=issuer)


def issuer_client() -> httpx2.Client:
    """A client that follows no redirects and has short timeouts."""
    headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
    return httpx2.Client(timeout=_STEP_S, follow_redirects=False, headers=headers)


def _fetch_keys(issuer: str, *, own_host: bool) -> tuple[Mapping[str, Any], dict[str, Mapping[str, Any]]]:
    """The issuer's discovery document, and its public keys for signatures by id. Raises ValueError for documents of
    another issuer."""
    deadline = time.monotonic() + FETCH_S
    with issuer_client() as http:
        discovery = _get(http, f"{issuer.removesuffix('/')}/.well-known/openid-configuration", deadline)
        if discovery.get("issuer") != issuer:
            raise ValueError("its discovery document belongs to another issuer")
        address = discovery.get("jwks_uri")
        if not isinstance(address, str) or not _may_ask(address, issuer, own_host=own_host):
            raise ValueError("its keys are not on its own host" if own_host else "its keys are at no https address")
        rows = _get(http, address, deadline).get("keys")
    if not isinstance(rows, list) or len(cast("list[object]", rows)) > MAX_KEYS:
        raise ValueError(f"it has no list of at most {MAX_KEYS} keys")
    tables = [cast("dict[str, Any]", row) for row in cast("list[object]", rows) if isinstance(row, dict)]
    usable = [row for row in tables if row.get("kty") in KEY_TYPES.values() and row.get("use", "sig") == "sig"]
    return discovery, {row["kid"]: row for row in usable if isinstance(row.get("kid"), str)}


def _may_ask(address: str, issuer: str, *, own_host: bool) -> bool:
    there, own = urlsplit(address), urlsplit(issuer)
    return there[:2] == own[:2] or (not own_host and there.scheme == "https" and bool(there.hostname))


def is_trusted_address(address: object, issuer: str) -> bool:
    """Whether users and their codes may be sent to an address that an issuer names: on its own host, or by https."""
    return isinstance(address, str) and _may_ask(address, issuer, own_host=False)


def _get(http: httpx2.Client, url: str, deadline: float) -> dict[str, Any]:
    status, table = fetch_table(http, "GET", url, deadline)
    if status != 200:
        raise ValueError(f"it answers {status}")
    return table


def fetch_table(
    http: httpx2.Client, method: str, url: str, deadline: float, **request: Any
) -> tuple[int, dict[str, Any]]:
    """The status and the JSON object of an answer, an empty one for an error without. Raises one of FETCH_ERRORS, also
    for an answer that is malformed, too long or too late."""
    content = bytearray()
    with http.stream(method, url, **request) as response:
        status = response.status_code
        if status not in _WITH_OBJECT:
            return status, {}
        if "content-encoding" in response.headers:
            raise ValueError("its answer is compressed")
        for chunk in response.iter_raw():
            content += chunk
            if len(content) > MAX_BYTES:
                raise ValueError(f"its answer has more than {MAX_BYTES:,} bytes")
            if time.monotonic() > deadline:
                raise ValueError(f"it takes more than {FETCH_S} s")
    try:
        table = orjson.loads(content)
    except ValueError:
        if status == 200:
            raise
        return status, {}
    if not isinstance(table, dict):
        raise ValueError("its answer is not a JSON object")
    return status, cast("dict[str, Any]", table)
