"""A WSGI filter for Swift's proxy, which imports it: keeps what it asks about accounts and buckets in its own memory.

A public Swift does this with memcached. Without any cache, each request to the store asks two other servers whether
its account and its bucket exist, which takes half of the CPU of a test's store. Objects are never kept here.
"""

import time
from collections.abc import Callable, Iterable
from typing import Any

LASTS_S = 5.0
"""The delay after which a proxy notices that a bucket was removed through another one."""
MISSING = 404
"""The status of answers that are not cached: the first upload in parts makes a bucket for them, and sends them to every
proxy."""

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class MetadataCache:
    """The part of Swift's memcached client that its proxy calls."""

    def __init__(self) -> None:
        self._values: dict[str, tuple[float, Any]] = {}

    def get(self, key: str, raise_on_error: bool = False) -> Any:
        until, value = self._values.get(key, (0.0, None))
        return value if time.monotonic() < until else None

    def set(self, key: str, value: Any, time: float = 0, raise_on_error: bool = False) -> None:
        if isinstance(value, dict) and value.get("status") == MISSING:
            return
        self._values[key] = (_now() + min(time or LASTS_S, LASTS_S), value)

    def delete(self, key: str) -> None:
        self._values.pop(key, None)


def _now() -> float:
    return time.monotonic()


def filter_factory(settings: dict[str, str], **section: str) -> Callable[[Application], Application]:
    """Called by Paste for `paste.filter_factory` in the proxy's configuration."""
    cache = MetadataCache()

    def wrap(application: Application) -> Application:
        def cached(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            environ["swift.cache"] = cache
            return application(environ, start_response)

        return cached

    return wrap
