"""Request ids and the access log.

The log is JSON lines or text on stderr: time, method, route template, status, seconds, actor, request id, address. It
contains no path, query, header or body, which may hold secrets; the route template shows what was requested.
"""

import json
import re
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from starlette.types import ASGIApp, Message, Receive, Scope, Send

AccessLog = Literal["json", "text", "off"]
Observe = Callable[[str, str | None, int, float], None]
"""(method, route template, status, seconds)"""
HEADER = b"x-request-id"
NOSNIFF = (b"x-content-type-options", b"nosniff")
"""Browsers must not guess another Content-Type: any answer may contain text of users."""
_GIVEN = re.compile(rb"[A-Za-z0-9._-]{1,64}")
"""Request ids accepted from a proxy; anything else could forge log lines."""


@dataclass(slots=True)
class Exchange:
    """A request and its response. `actor` is set once a route has identified the caller."""

    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    actor: str | None = None
    status: int = 500
    """The status of a request that gets no response, until one starts."""


current: ContextVar[Exchange | None] = ContextVar("registry.api.http.exchanges", default=None)


def request_id() -> str | None:
    """The id of the current request."""
    exchange = current.get()
    return exchange.request_id if exchange else None


class Exchanges:
    """Gives each request an id, returns it as `X-Request-Id`, adds `nosniff`, and logs and counts the response."""

    def __init__(self, app: ASGIApp, access_log: AccessLog, observe: Observe | None = None) -> None:
        self.app, self._observe = app, observe
        self._line: Callable[[Mapping[str, Any]], str] | None = {"json": _json, "text": _text, "off": None}[access_log]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == HEADER), b"")
        exchange = Exchange(given.decode()) if _GIVEN.fullmatch(given) else Exchange()
        began = time.perf_counter()
        current.set(exchange)  # for this request's task, and for the error handler of last resort

        async def identified(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                more = [(HEADER, exchange.request_id.encode()), NOSNIFF]
                if scope["app"].state.draining:  # a connection that stays open would break when the server has ended
                    more.append((b"connection", b"close"))
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        try:
            await self.app(scope, receive, identified)
        finally:
            seconds, route = time.perf_counter() - began, _template(scope)
            if self._observe is not None:
                self._observe(scope["method"], route, exchange.status, seconds)
            if self._line is not None:
                sys.stderr.write(f"{self._line(self._row(scope, exchange, route, seconds))}\n")

    def _row(self, scope: Scope, exchange: Exchange, route: str | None, seconds: float) -> dict[str, Any]:
        client = scope.get("client")
        return {
            "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "method": scope["method"],
            "route": route,
            "status": exchange.status,
            "seconds": round(seconds, 6),
            "actor": exchange.actor,
            "request_id": exchange.request_id,
            "address": client[0] if client else None,
        }


def _template(scope: Scope) -> str | None:
    """The route template, None if no route matched. Repository routes are mounted twice and lack their prefix. The
    framework does not report a match of its own route, that of the OpenAPI document.
    """
    if scope["path"] == scope["app"].openapi_url:
        return str(scope["path"])
    route = scope.get("route")
    template: str | None = getattr(route, "path_format", getattr(route, "path", None))
    if template is None or template.startswith("/v1") or not scope["path"].startswith("/v1/"):
        return template
    return "/".join(scope["path"].split("/", 3)[:3]) + template


def _json(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=True)


def _text(row: Mapping[str, Any]) -> str:
    """Values with special characters are JSON-encoded: a name must not forge a line."""
    return " ".join(f"{name}={_plain(value)}" for name, value in row.items())


def _plain(value: object) -> str:
    text = "-" if value is None else str(value)
    return text if re.fullmatch(r"[\x21\x23-\x7e]+", text) else json.dumps(text)
