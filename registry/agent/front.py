"""The front of `adaptory route`: a proxy of the OpenAI routes that turns a channel into a version.

A request to acme/sql@prod becomes one to acme/sql@1.2.0, chosen by the weights in routes.json. A request with the field
`user` is sticky: the same user gets the same version while the weights stay. Requests under way are counted from the
choice on, so that an agent unloads no version that a request is on its way to.
"""

import hashlib
import json
import secrets
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from math import ceil, log
from typing import Any, cast

import anyio
import httpx2
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client import Counter as Total
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from composer.formats.sets.router import BASE
from registry.agent.directory import MirrorDirectory, Routes
from registry.agent.phrases import phrase_for, split_task, tasks_of, with_phrase_before
from registry.errors import RegistryError, Usage

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
"""What is passed on. The rest of a server's API, such as that which loads adapters, is not for users."""
UNDER_WAY, FIGURES = "/-/under-way", "/-/figures"
BOUND_S, BOUND_RATIO, BOUNDS = 0.01, 1.1, 116
"""Times are counted by the bounds BOUND_S x BOUND_RATIO^i, as `registry.wire.fleet` states them."""
MAX_BODY_BYTES = 64 << 20
_TIMEOUT = httpx2.Timeout(10.0, read=600.0)
_KEPT_S = 2.0
"""vLLM closes a connection that was not used for 5 seconds: it must not be reused just then."""
_NOT_PASSED = frozenset({
    b"connection", b"content-length", b"date", b"host", b"keep-alive", b"proxy-authenticate", b"proxy-authorization",
    b"server", b"te", b"trailer", b"transfer-encoding", b"upgrade",
})  # fmt: skip
_TAIL_BYTES = 4096
"""As much of a streamed answer is kept for its last events, which hold usage and finish reason."""
_MAX_COUNTED_BYTES = 4 << 20
"""A longer answer that is not streamed is passed on, and its tokens are not counted."""
_MAX_NAME_CHARS = 500
OF_BASE = f"#{BASE}"
"""Ends the name of the base in a set, which no client can request."""
LEFT = 499
"""The status of a request whose client left."""
_OTHER = "other"
"""Stands in metrics for the models that no route names, and for unknown finish reasons: clients and servers can make up
any number of these."""
_REASONS = frozenset({"stop", "length", "tool_calls", "function_call", "content_filter", "abort", "error"})


class Table:
    """The routes of a directory, read again when their file changes."""

    def __init__(self, directory: MirrorDirectory) -> None:
        self._directory, self._path = directory, directory.root / "routes.json"
        self._written = (0, 0)
        self._routes = Routes()

    @property
    def routes(self) -> Routes:
        """The routes that could be read last."""
        with suppress(OSError):
            stat = self._path.stat()
            written = (stat.st_mtime_ns, stat.st_ino)
            if written != self._written:
                self._routes, self._written = self._directory.read_routes() or self._routes, written
        return self._routes

    def member(self, routes: Routes, version: str, document: Mapping[str, Any]) -> str:
        """The member of a set that its router chooses for a request, or the set's own name with OF_BASE; any other
        version itself. Raises Invalid if the set's file cannot be read."""
        if (members := routes.sets.get(version)) is None:
            return version
        chosen = self._directory.router(routes.commits[version]).choose(prompt_of(document))
        return members.get(chosen, f"{version}{OF_BASE}")


def prompt_of(document: Mapping[str, Any]) -> str:
    """The text by which a set's router chooses: what the user has written in the conversation, or the prompt."""
    given = document.get("messages", document.get("input", document.get("prompt")))
    rows = cast(list[Any], given) if isinstance(given, list) else [given]
    return "\n".join(text for row in rows for text in _texts_of(row))


def _texts_of(row: object) -> list[str]:
    """The texts of a message of a user, of a part of one, or of a prompt."""
    if isinstance(row, str):
        return [row]
    if not isinstance(row, dict):
        return []
    message = cast(Mapping[str, Any], row)
    if message.get("role", "user") != "user":
        return []
    content = message.get("content", message.get("text"))
    parts = cast(list[Any], content) if isinstance(content, list) else [content]
    return [text for part in parts for text in ([part] if isinstance(part, str) else _texts_of(part))]


def choose(weights: Mapping[str, int], user: str) -> str:
    """A version by its weight: the same one for the same user."""
    point = (
        int.from_bytes(hashlib.sha256(user.encode(errors="surrogatepass")).digest()[:8]) * sum(weights.values()) >> 64
    )
    bounds = accumulate(weights.values())
    return next(name for name, bound in zip(weights, bounds, strict=True) if point < bound)


@dataclass(slots=True)
class _Counts:
    """The requests to a channel that a version answered, as a canary is judged by. Requests that a client left, or that
    were wrong, are not failures."""

    requests: int = 0
    errors: int = 0
    seconds: Counter[int] = field(default_factory=Counter[int])

    def add(self, seconds: float, *, failed: bool) -> None:
        self.requests += 1
        self.errors += failed
        index = ceil(log(max(seconds, BOUND_S) / BOUND_S, BOUND_RATIO) - 1e-9)
        self.seconds[min(index, BOUNDS)] += 1

    def document(self) -> dict[str, Any]:
        return {"requests": self.requests, "errors": self.errors, "seconds": dict(self.seconds)}


@dataclass(frozen=True, slots=True)
class _Choice:
    """The model that answers a request: `model` is the name that servers know, or that of a set with OF_BASE, and
    `version` what the requested channel serves, if one was requested: the model, or the set that it belongs to."""

    model: str
    version: str
    channel: str | None = None


@dataclass(slots=True)
class _Outcome:
    """A request to a model, as it is counted. `label` is the model's name in metrics, `channel` the channel that was
    requested, if any, and `version` what it serves: the model, or the set that it belongs to."""

    model: str
    label: str
    channel: str | None
    version: str
    began_s: float
    ended: bool = False


class Figures:
    """Requests under way, and outcomes by version: vLLM labels neither its errors nor its latency by adapter. Requests
    to a channel are counted apart, since a version may also serve another channel or be requested by its own name."""

    def __init__(self) -> None:
        self.under_way = Counter[str]()
        self.source = secrets.token_hex(4)
        self.channels = defaultdict[str, defaultdict[str, _Counts]](lambda: defaultdict(_Counts))
        self._registry = CollectorRegistry()
        names = ["model"]
        self._requests = Total(
            "adaptory_front_requests", "Requests by version and status.", [*names, "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "adaptory_front_seconds", "Seconds to the end of an answer.", names, registry=self._registry
        )
        self._tokens = Total(
            "adaptory_front_tokens", "Tokens, where answers state them.", [*names, "kind"], registry=self._registry
        )
        self._finished = Total(
            "adaptory_front_finished", "Answers by finish reason.", [*names, "reason"], registry=self._registry
        )

    def begin(self, chosen: "_Choice", *, is_routed: bool) -> _Outcome:
        self.under_way[chosen.model] += 1
        label = chosen.model if is_routed else _OTHER
        return _Outcome(chosen.model, label, chosen.channel, chosen.version, time.monotonic())

    def end(self, outcome: _Outcome, status: int, answer: Mapping[str, Any] | None = None) -> None:
        """Counts the end of a request, once."""
        if outcome.ended:
            return
        outcome.ended = True
        self.under_way[outcome.model] -= 1
        if not self.under_way[outcome.model]:
            del self.under_way[outcome.model]
        self._requests.labels(outcome.label, str(status)).inc()
        seconds = time.monotonic() - outcome.began_s
        self._seconds.labels(outcome.label).observe(seconds)
        if outcome.channel is not None and status != LEFT:
            self.channels[outcome.channel][outcome.version].add(seconds, failed=status >= 500)
        if answer:
            self._count(outcome.label, answer)

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def _count(self, label: str, answer: Mapping[str, Any]) -> None:
        usage, choices = answer.get("usage"), answer.get("choices")
        for kind in ("prompt_tokens", "completion_tokens"):
            if isinstance(usage, dict) and isinstance(count := cast(Mapping[str, Any], usage).get(kind), int):
                self._tokens.labels(label, kind.removesuffix("_tokens")).inc(min(max(0, count), _MAX_COUNTED_BYTES))
        for choice in cast(list[Any], choices) if isinstance(choices, list) else ():
            if isinstance(choice, dict) and (reason := cast(Mapping[str, Any], choice).get("finish_reason")):
                self._finished.labels(label, str(reason) if str(reason) in _REASONS else _OTHER).inc()


class Front:
    """`upstreams` are the servers for models that routes do not name, such as the base; by default, those of the
    routes."""

    def __init__(self, directory: MirrorDirectory, upstreams: Sequence[str]) -> None:
        self.table, self.figures, self._upstreams = Table(directory), Figures(), tuple(upstreams)
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=200, keepalive_expiry=_KEPT_S)
        self._http = httpx2.AsyncClient(timeout=_TIMEOUT, limits=limits)
        self._turn = 0

    def app(self) -> Starlette:
        routes = [Route(path, self.forward, methods=["POST"]) for path in PATHS]
        routes += [Route("/v1/models", self.models), Route(UNDER_WAY, self.counts), Route("/metrics", self.metrics)]
        routes.append(Route(FIGURES, self.count_versions))
        return Starlette(routes=[*routes, Route("/healthz", self.health)])

    async def health(self, _request: Request) -> Response:
        return JSONResponse({"status": "ok", "channels": len(self.table.routes.channels)})

    async def counts(self, _request: Request) -> Response:
        return JSONResponse(dict(self.figures.under_way))

    async def count_versions(self, _request: Request) -> Response:
        """The figures by channel and version since this front started, for canaries."""
        counted = {
            channel: {name: counts.document() for name, counts in versions.items()}
            for channel, versions in self.figures.channels.items()
        }
        return JSONResponse({"source": self.figures.source, "channels": counted})

    async def metrics(self, _request: Request) -> Response:
        return Response(self.figures.text(), media_type="text/plain; version=0.0.4")

    async def models(self, _request: Request) -> Response:
        """The channels and versions that can be requested here, and their tasks."""
        routes = self.table.routes
        names = (*routes.channels, *routes.commits, *tasks_of(routes))
        rows = [{"id": name, "object": "model", "owned_by": "adaptory"} for name in names]
        return JSONResponse({"object": "list", "data": rows})

    async def forward(self, request: Request) -> Response:
        """Passes a request on, under the name of a version."""
        try:
            return await self._forward(request)
        except RecursionError:
            return _error(400, "The request is nested too deeply.")

    async def _forward(self, request: Request) -> Response:
        body = await _body(request)
        if body is None:
            return _error(413, f"The request is larger than {MAX_BODY_BYTES:,} bytes.")
        try:
            document = json.loads(body)
            requested = document["model"]
        except (ValueError, KeyError, TypeError):
            return _error(400, "The request is not a JSON object that names a `model`.")
        if not isinstance(requested, str):
            return _error(400, "`model` is not a text.")
        if not requested.isprintable() or len(requested) > _MAX_NAME_CHARS:
            return _error(400, f"`model` has characters that cannot be printed, or more than {_MAX_NAME_CHARS}.")
        routes, channel = self.table.routes, None
        requested, task = split_task(routes, requested)
        version = requested
        if weights := routes.channels.get(requested):
            channel = requested
            user = document.get("user")
            version = choose(weights, user if isinstance(user, str) and user else secrets.token_hex(8))
        elif "@" in requested and requested not in routes.commits:
            return _error(404, f"No channel or version is served as {requested}.")
        try:
            if task:
                document = with_phrase_before(document, phrase_for(routes, version, task))
        except Usage as error:
            return _error(404 if error.code == "task_unknown" else 400, error.detail)
        try:
            model = self.table.member(routes, version, document)
        except RegistryError:
            return _error(503, f"The members of {version} cannot be read.")  # the agent's report says why
        return await self._send(request, _Choice(model, version, channel), document, routes)

    def _servers(self, routes: Routes, chosen: _Choice) -> Sequence[str]:
        """The servers that have the model, in turn; for the base of a set, those of its members. A server that watches
        a directory has no address there."""
        model = chosen.model
        if model.endswith(OF_BASE) and (members := routes.sets.get(chosen.version)):
            model = next(iter(members.values()))
        by_model = {name: [url for url in urls if url.startswith("http")] for name, urls in routes.servers.items()}
        of_routes = [server for servers in by_model.values() for server in servers]
        servers = by_model.get(model) or self._upstreams or tuple(dict.fromkeys(of_routes))
        self._turn += 1
        first = self._turn % max(1, len(servers))
        return (*servers[first:], *servers[:first])

    async def _send(self, request: Request, chosen: _Choice, document: Mapping[str, Any], routes: Routes) -> Response:
        """Sends the request to the first server that begins to answer. Moves on to the next server if one cannot be
        reached, has closed the connection, or was restarted and does not know the model yet. Then tries the first
        server once more, since it may have closed only an idle connection."""
        headers, servers, model = _passed(request.headers.raw), self._servers(routes, chosen), chosen.model
        outcome = self.figures.begin(chosen, is_routed=model in routes.commits or chosen.version in routes.sets)
        error = f"No server has {model}."
        try:
            for server in (*servers, *servers[:1]):
                body = json.dumps(_stated(document, model, server, routes)).encode()
                sent = self._http.build_request("POST", server + request.url.path, content=body, headers=headers)
                try:
                    answer = await self._http.send(sent, stream=True)
                except (
                    httpx2.ConnectError,
                    httpx2.ConnectTimeout,
                    httpx2.RemoteProtocolError,
                    httpx2.ReadError,
                ) as lost:
                    error = f"A server of {model} gave no answer: {type(lost).__name__}."
                    continue
                if answer.status_code == 404 and len(servers) > 1:
                    await answer.aclose()
                    error = f"A server does not know {model}."
                    continue
                return _PassedOn(answer, model, partial(self.figures.end, outcome))
        except httpx2.TransportError as lost:
            self.figures.end(outcome, 504)
            return _error(504, f"A server of {model} took too long: {type(lost).__name__}.")
        except BaseException:
            self.figures.end(outcome, LEFT)
            raise
        self.figures.end(outcome, 503)
        return _error(503, error)


class _PassedOn(StreamingResponse):
    """Passes the bytes of an answer on as they come. Counts the request when they end, however they end: a client may
    leave before the first one."""

    def __init__(
        self, answer: httpx2.Response, model: str, end: Callable[[int, Mapping[str, Any] | None], None]
    ) -> None:
        super().__init__(self._chunks(), answer.status_code)
        self.raw_headers = _passed(answer.headers.raw)
        if model.isascii():
            self.headers["x-served-model"] = model
        self._answer, self._end = answer, end
        self._kept = bytearray()
        self._is_stream = answer.headers.get("content-type", "").startswith("text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._count(LEFT)  # unless it has ended
            with anyio.CancelScope(shield=True):
                await self._answer.aclose()

    def _count(self, status: int) -> None:
        self._end(status, _last(self._kept, is_stream=self._is_stream))

    async def _chunks(self) -> AsyncIterator[bytes]:
        async for chunk in self._answer.aiter_raw():
            if self._is_stream or len(self._kept) <= _MAX_COUNTED_BYTES:
                self._kept += chunk
            if self._is_stream and len(self._kept) > 2 * _TAIL_BYTES:
                del self._kept[:-_TAIL_BYTES]
            yield chunk
        self._count(self._answer.status_code)  # before the client sees the end


def _passed(headers: Sequence[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The headers that are not for one connection only, as they came."""
    rows = [(name.lower(), value) for name, value in headers]
    of_connection = {
        word.strip().lower() for name, value in rows if name == b"connection" for word in value.split(b",")
    }
    return [(name, value) for name, value in rows if name not in _NOT_PASSED | of_connection]


def _stated(document: Mapping[str, Any], model: str, server: str, routes: Routes) -> Mapping[str, Any]:
    """The request under the model's name, written anew so that the server reads the same name: a body may have the
    field twice. For servers of llama.cpp it has the scales of all adapters: what a client states there could mix
    adapters, and one that a request does not name has the scale that the server was given for all requests."""
    of_set = model.removesuffix(OF_BASE) in routes.sets
    document = {**document, "model": routes.bases.get(server, model) if of_set else model}
    if (scales := routes.lora.get(server)) is None:
        return document
    is_version = server in routes.servers.get(model, ())
    return {
        **document,
        "lora": [{"id": number, "scale": scale if is_version else 0.0} for number, scale in enumerate(scales)],
    }


def _last(kept: bytearray, *, is_stream: bool) -> Mapping[str, Any] | None:
    """The answer or, if it was streamed, what its last events state; None if that cannot be read."""
    merged: dict[str, Any] = {}
    lines = [line[6:] for line in kept.split(b"\n") if line.startswith(b"data: {")] if is_stream else [bytes(kept)]
    for line in lines:
        try:
            document = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(document, dict):
            row = cast(dict[str, Any], document)
            merged |= {name: row[name] for name in ("usage", "choices") if row.get(name)}
    return merged or None


async def _body(request: Request) -> bytes | None:
    """The body; None if it is too large."""
    kept = bytearray()
    async for chunk in request.stream():
        kept += chunk
        if len(kept) > MAX_BODY_BYTES:
            return None
    return bytes(kept)


def _error(status: int, message: str) -> Response:
    """An error in the form of the OpenAI API."""
    return JSONResponse({"error": {"message": message, "type": "adaptory", "code": status}}, status)
