"""One request and its answer: the id that both carry, and the line of the access log.

The log is JSON lines or text on stderr: time, method, route template, status, seconds, actor, request id, address. It
has no path, query, header or body, in which there may be secrets: the route's template says what was asked.
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
HEADER = b"x-request-id"
_GIVEN = re.compile(rb"[A-Za-z0-9._-]{1,64}")
"""What a proxy in front may call a request; anything else could forge lines of a log."""


@dataclass(slots=True)
class Exchange:
    """`actor` is known once a route has asked who calls."""

    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    actor: str | None = None
    status: int = 500
    """Until an answer begins, what a request ends with that gets none."""


current: ContextVar[Exchange | None] = ContextVar("registry.api.http.exchanges", default=None)


def request_id() -> str | None:
    """Of the request that is being answered."""
    exchange = current.get()
    return exchange.request_id if exchange else None


class Exchanges:
    """Gives each request an id, puts it into the answer's `X-Request-Id`, and logs the answer when it has ended."""

    def __init__(self, app: ASGIApp, access_log: AccessLog) -> None:
        self.app = app
        self._line: Callable[[Mapping[str, Any]], str] | None = {"json": _json, "text": _text, "off": None}[access_log]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == HEADER), b"")
        exchange = Exchange(given.decode()) if _GIVEN.fullmatch(given) else Exchange()
        began = time.perf_counter()
        current.set(exchange)  # for this request's own task, and for what answers when all else has failed

        async def identified(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                message = {**message, "headers": [*message["headers"], (HEADER, exchange.request_id.encode())]}
            await send(message)

        try:
            await self.app(scope, receive, identified)
        finally:
            if self._line is not None:
                self._log(scope, exchange, time.perf_counter() - began)

    def _log(self, scope: Scope, exchange: Exchange, seconds: float) -> None:
        assert self._line is not None  # noqa: S101
        client = scope.get("client")
        line = self._line({
            "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "method": scope["method"],
            "route": _template(scope),
            "status": exchange.status,
            "seconds": round(seconds, 6),
            "actor": exchange.actor,
            "request_id": exchange.request_id,
            "address": client[0] if client else None,
        })  # fmt: skip
        sys.stderr.write(f"{line}\n")


def _template(scope: Scope) -> str | None:
    """None where no route answered. Routes of repositories are mounted twice, and say only what follows the prefix."""
    route = scope.get("route")
    template: str | None = getattr(route, "path_format", getattr(route, "path", None))
    if template is None or template.startswith("/v1") or not scope["path"].startswith("/v1/"):
        return template
    return "/".join(scope["path"].split("/", 3)[:3]) + template


def _json(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=True)


def _text(row: Mapping[str, Any]) -> str:
    """Values as JSON writes them where they have more than plain characters: a name must not forge a line."""
    return " ".join(f"{name}={_plain(value)}" for name, value in row.items())


def _plain(value: object) -> str:
    text = "-" if value is None else str(value)
    return text if re.fullmatch(r"[\x21\x23-\x7e]+", text) else json.dumps(text)
