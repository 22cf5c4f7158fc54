"""The keys of issuers of ID tokens: found by OpenID Connect's discovery, cached, and fetched anew for an unknown key.

Only issuers that the operator names are asked. No redirect is followed, the keys are on the issuer's own host, and time
and size are bounded, so that neither a token nor an issuer makes the server call anything else.
"""

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
"""How long keys are used without asking again, and thus how late a withdrawn one is noticed."""
MIN_INTERVAL_S = 60
"""The shortest time between two fetches: tokens with invented keys cause no more."""
RETRY_S = 10
"""The same after a fetch that failed."""
MAX_BYTES = 256 << 10
MAX_KEYS = 100
FETCH_S = 10
_STEP_S = 5


@dataclass(slots=True)
class _Known:
    """An issuer's keys by id. `error` is why the last fetch failed."""

    lock: Lock = field(default_factory=Lock)
    keys: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    fetched_at: float = float("-inf")
    tried_at: float = float("-inf")
    error: str | None = None


@dataclass(slots=True)
class IssuerKeys:
    """Caches the keys of each issuer. Threads that need the same issuer's keys wait for one fetch."""

    clock: Callable[[], float] = time.monotonic
    _known: dict[str, _Known] = field(default_factory=dict[str, _Known])

    def find(self, issuer: str, key_id: str) -> Mapping[str, Any]:
        """The issuer's key with that id. Raises Unauthenticated if the issuer has none, and Unavailable if it cannot be
        asked."""
        known = self._known.setdefault(issuer, _Known())
        if (key := self._fresh(known).get(key_id)) is not None:
            return key
        with known.lock:
            pause = RETRY_S if known.error else MIN_INTERVAL_S
            if key_id not in self._fresh(known) and self.clock() - known.tried_at >= pause:
                self._fetch(issuer, known)
            key, error = self._fresh(known).get(key_id), known.error
        if key is not None:
            return key
        if error is not None:
            raise Unavailable(
                "issuer_unavailable",
                f"The keys of {issuer} cannot be fetched: {error}.",
                subject=issuer,
                next_step="Try again; if it stays, an operator checks that this server reaches the issuer.",
            )
        raise invalid(f"{issuer} has no such key")

    def _fresh(self, known: _Known) -> Mapping[str, Mapping[str, Any]]:
        return known.keys if self.clock() - known.fetched_at < MAX_AGE_S else {}

    def _fetch(self, issuer: str, known: _Known) -> None:
        known.tried_at = self.clock()
        try:
            known.keys = _fetch_keys(issuer)
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError) as error:
            known.error = str(error) or type(error).__name__
        else:
            known.fetched_at, known.error = self.clock(), None


def _fetch_keys(issuer: str) -> dict[str, Mapping[str, Any]]:
    """The public keys for signatures, by id. Raises ValueError for documents that are not the issuer's."""
    deadline = time.monotonic() + FETCH_S
    headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
    with httpx2.Client(timeout=_STEP_S, follow_redirects=False, headers=headers) as http:
        discovery = _get(http, f"{issuer}/.well-known/openid-configuration", deadline)
        if discovery.get("issuer") != issuer:
            raise ValueError("its discovery document is of another issuer")
        address = discovery.get("jwks_uri")
        if not isinstance(address, str) or urlsplit(address)[:2] != urlsplit(issuer)[:2]:
            raise ValueError("its keys are not on its own host")
        rows = _get(http, address, deadline).get("keys")
    if not isinstance(rows, list) or len(cast("list[object]", rows)) > MAX_KEYS:
        raise ValueError(f"it has no list of at most {MAX_KEYS} keys")
    tables = [cast("dict[str, Any]", row) for row in cast("list[object]", rows) if isinstance(row, dict)]
    usable = [row for row in tables if row.get("kty") in KEY_TYPES.values() and row.get("use", "sig") == "sig"]
    return {row["kid"]: row for row in usable if isinstance(row.get("kid"), str)}


def _get(http: httpx2.Client, url: str, deadline: float) -> dict[str, Any]:
    content = bytearray()
    with http.stream("GET", url) as response:
        if response.status_code != 200:
            raise ValueError(f"it answers {response.status_code}")
        if "content-encoding" in response.headers:
            raise ValueError("its answer is compressed")
        for chunk in response.iter_raw():
            content += chunk
            if len(content) > MAX_BYTES:
                raise ValueError(f"its answer has more than {MAX_BYTES:,} bytes")
            if time.monotonic() > deadline:
                raise ValueError(f"it takes more than {FETCH_S} s")
    table = orjson.loads(content)
    if not isinstance(table, dict):
        raise ValueError("its answer is not a JSON object")
    return cast("dict[str, Any]", table)
