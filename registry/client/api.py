"""Calls to a registry, over HTTP or in process. Answers are validated here, once, as documents of `registry.wire`;
errors are of the seven families."""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cached_property
from importlib.metadata import version
from typing import Any, TypeVar, cast, overload
from urllib.parse import quote

import httpx2
from pydantic import ValidationError

from composer.formats.checkpoints.checkpoint import Architecture
from composer.formats.checkpoints.header import TensorSpec
from registry.errors import FAMILIES, Conflict, Invalid, NotFound, RegistryError, Unavailable
from registry.formats.references import Reference, RepositoryName, parse_version
from registry.wire.catalog import BaseOut, NamedRelease
from registry.wire.document import Page, Wire
from registry.wire.search import ResolvedOut
from registry.wire.transfer import PutOut

Json = dict[str, Any]
"""A document without a type, for callers that name none."""
Answer = TypeVar("Answer", bound=Wire)
Item = TypeVar("Item", bound=Wire)
Token = str | Callable[[], str | None] | None
"""A token, or a function that returns the current one: a single-user server has a new secret after each restart."""
_PAGE = 500
"""Maximum items per page."""
_Rows = Page[Json]
_UNSENT = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout)
_TIMEOUT = httpx2.Timeout(30.0, read=300.0)
_MAX_LINE_BYTES = 16 << 20
EVENTS_SILENT_S = 45.0
"""A server sends a comment after 25 seconds without events."""


@dataclass(frozen=True, slots=True)
class Stream:
    """A download. `url` is the final address of the bytes: the next part can be requested there directly."""

    url: str
    chunks: Iterator[bytes]


class Api:
    """A registry's API. `transport` is None for HTTP; `on_change` is called before each change. Thread-safe.

    Methods that are called with a class of `registry.wire` return a document of it, or raise `bad_answer`, which names
    the address and the field. Without one, they return the object as it comes.
    """

    def __init__(
        self,
        url: str,
        transport: httpx2.BaseTransport | None = None,
        token: Token = None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.url, self._on_change = url, on_change
        # Only the registry's own address is in this process; a presigned link leads to the store outside it.
        self._http = httpx2.Client(
            base_url=url,
            mounts={url: transport} if transport else None,
            transport=_Outside() if transport else None,
            timeout=_TIMEOUT,
            auth=_Bearer(url, token) if token else None,
            headers={"User-Agent": f"adaptory/{version('adaptory')}"},
            event_hooks={"response": [self._note_date]},
        )
        self._dated: tuple[float, float] | None = None

    @property
    def ahead_s(self) -> float | None:
        """The seconds by which this machine's clock is ahead of the registry's, to a second or two. It is known from
        the registry's last answer and a steady clock, so that a jump shows without another answer. None before the
        first one."""
        if self._dated is None:
            return None
        theirs_s, steady_s = self._dated
        return time.time() - (theirs_s + time.monotonic() - steady_s)

    def _note_date(self, response: httpx2.Response) -> None:
        if _is_of(response.request.url, httpx2.URL(self.url)):
            with suppress(KeyError, ValueError, TypeError, OverflowError):  # without a date, or with a wrong one
                self._dated = _moment(response.headers["Date"]).timestamp(), time.monotonic()

    def close(self) -> None:
        self._http.close()

    @overload
    def get(self, path: str, answer: type[Answer], /, **query: Any) -> Answer: ...
    @overload
    def get(self, path: str, /, **query: Any) -> Json: ...
    def get(self, path: str, answer: type[Answer] | None = None, /, **query: Any) -> Answer | Json:
        return _as(answer, path, self._call("GET", path, query=query))

    @overload
    def post(self, path: str, body: Any, answer: type[Answer], headers: Mapping[str, str] | None = None) -> Answer: ...
    @overload
    def post(
        self, path: str, body: Any = None, answer: None = None, headers: Mapping[str, str] | None = None
    ) -> Json: ...
    def post(
        self,
        path: str,
        body: Any = None,
        answer: type[Answer] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer | Json:
        return _as(answer, path, self._call("POST", path, body=body if body is not None else {}, headers=headers))

    @overload
    def put(self, path: str, body: Any, answer: type[Answer], headers: Mapping[str, str] | None = None) -> Answer: ...
    @overload
    def put(self, path: str, body: Any, answer: None = None, headers: Mapping[str, str] | None = None) -> Json: ...
    def put(
        self, path: str, body: Any, answer: type[Answer] | None = None, headers: Mapping[str, str] | None = None
    ) -> Answer | Json:
        return _as(answer, path, self._call("PUT", path, body=body, headers=headers))

    def delete(self, path: str, answer: type[Answer], /, **query: Any) -> Answer:
        return read(answer, path, self._call("DELETE", path, query=query))

    def send(self, put: PutOut, chunks: Iterable[bytes]) -> None:
        """Sends a file by an upload's plan; its url is the registry's, or that of the store behind it.

        Raises Unavailable if a retry may succeed, and Conflict if the store refuses: then the request has expired, or
        the bytes are not those that it was signed for. Raises Invalid for a different number of bytes.
        """
        with understood(put.url):
            size_bytes = int(put.headers["Content-Length"])
        with _translate_transport_errors(put.url):
            response = self._http.put(put.url, content=_exactly(size_bytes, chunks), headers=put.headers)
        if 400 <= response.status_code < 500 and not _is_problem(response):
            raise Conflict("store_refused", f"The blob store answered {response.status_code}: {response.text[:200]}")
        _raise_problem(response)

    @contextmanager
    def stream(self, url: str, start: int = 0, length: int | None = None) -> Generator[Stream]:
        """Yields the bytes at `url` from `start` on, at most `length` of them, as they arrive."""
        last = "" if length is None else str(start + length - 1)
        headers = {"Range": f"bytes={start}-{last}"} if start or length else {}
        with (
            _translate_transport_errors(url),
            self._http.stream("GET", url, headers=headers, follow_redirects=True) as response,
        ):
            if response.status_code >= 400:
                response.read()
            _raise_problem(response)
            if start and response.status_code != 206:
                raise Unavailable("range_ignored", f"{url} does not support ranges.")
            yield Stream(str(response.url), response.iter_raw())

    def first(self, path: str, item: type[Item], most: int, **query: Any) -> tuple[list[Item], str | None]:
        """At most `most` items of a list, and the cursor for further ones, or None."""
        items: list[Item] = []
        cursor: str | None = query.pop("cursor", None)
        while True:
            page = self.get(path, _Rows, cursor=cursor, limit=min(most - len(items), _PAGE), **query)
            items += [read(item, path, row) for row in page.items]
            cursor = page.next
            if cursor is None or len(items) >= most:
                return items, cursor

    @overload
    def pages(self, path: str, item: type[Item], /, **query: Any) -> Iterator[Item]: ...
    @overload
    def pages(self, path: str, /, **query: Any) -> Iterator[Json]: ...
    def pages(self, path: str, item: type[Item] | None = None, /, **query: Any) -> Iterator[Item | Json]:
        """Every item of a list, a page at a time."""
        cursor: str | None = None
        while True:
            page = self.get(path, _Rows, cursor=cursor, **query)
            yield from (_as(item, path, row) for row in page.items)
            cursor = page.next
            if cursor is None:
                return

    def lines(self, path: str, **query: Any) -> Generator[str]:
        """A streamed answer, line by line."""
        given = {key: value for key, value in query.items() if value is not None}
        with _translate_transport_errors(self.url), self._http.stream("GET", path, params=given) as response:
            if response.status_code >= 400:
                response.read()
            _raise_problem(response)
            yield from _lines(response.iter_bytes())

    def events(self, path: str, last: str | None, **query: Any) -> Generator[tuple[str, str]]:
        """Server-sent events after the one with the id `last`, as id and data. Raises Unavailable if the server sends
        nothing, not even a comment, for EVENTS_SILENT_S."""
        headers = {"Accept": "text/event-stream", **({"Last-Event-ID": last} if last else {})}
        timeout = httpx2.Timeout(30.0, read=EVENTS_SILENT_S)
        with (
            _translate_transport_errors(self.url),
            self._http.stream("GET", path, params=query, headers=headers, timeout=timeout) as response,
        ):
            if response.status_code >= 400:
                response.read()
            _raise_problem(response)
            if not response.headers.get("content-type", "").startswith("text/event-stream"):
                raise untrusted("bad_answer", f"{path} sends something other than events")
            event_id = ""
            for line in _lines(response.iter_bytes()):
                field, _, value = line.partition(": ")
                if field == "id":
                    event_id = value
                elif field == "data":
                    yield event_id, value

    def resolve(self, reference: Reference) -> ResolvedOut:
        """Resolves a reference to what is needed to fetch a release; GET its `path` for facts and scores."""
        answer = self.get("/v1/resolve", ResolvedOut, ref=str(reference))
        refuse_other_answer(reference, answer.release)
        return answer

    def repository_path(self, repository: str) -> str:
        """The route of a repository, looked up because its name does not show its kind. Raises NotFound."""
        unknown = None
        for path in (f"/v1/{kind}/{repository}" for kind in ("adapters", "models", "sets")):
            try:
                self.get(path)
            except NotFound as error:
                if error.code != "repository_unknown":
                    raise
                unknown = unknown or error
            else:
                return path
        detail = f"Repository {repository} does not exist, or you have no access to it."
        next_step = unknown.next_step if unknown else None
        raise NotFound("repository_unknown", detail, subject=repository, next_step=next_step) from unknown

    def base(self, text: str) -> BaseOut:
        return self.get(f"/v1/bases/{quote(text)}", BaseOut)

    def architecture(self, base: str) -> Architecture:
        """The base's tensors, which an adapter is checked against before its bytes are sent."""
        path = f"/v1/bases/{quote(base)}"
        answer = self.get(path, BaseOut, tensors=True)
        if answer.tensors is None:
            raise untrusted("bad_answer", f"{path} lacks tensors")
        tensors = {row.name: TensorSpec(row.dtype, tuple(row.shape)) for row in answer.tensors}
        return Architecture(answer.model_type, answer.tied, tensors)

    def _call(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, Any] | None = None,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
    ) -> Json:
        given = {key: value for key, value in (query or {}).items() if value is not None and value != []}
        if method != "GET":
            self._on_change()
        with _translate_transport_errors(self.url, changes=method != "GET"):
            response = self._http.request(method, path, params=given, json=body, headers=headers)
        _raise_problem(response)
        return _document(response)


class _Outside(httpx2.BaseTransport):
    """HTTP transport that is opened by its first request: reading the certificates costs 40 ms, and few commands leave
    the process."""

    @cached_property
    def _transport(self) -> httpx2.HTTPTransport:
        return httpx2.HTTPTransport()

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        return self._transport.handle_request(request)

    def close(self) -> None:
        if "_transport" in self.__dict__:
            self._transport.close()


class _Bearer(httpx2.Auth):
    """Sends the token to the registry only: a store refuses a presigned link together with another authentication."""

    def __init__(self, url: str, token: str | Callable[[], str | None]) -> None:
        self._home = httpx2.URL(url)
        self._token = token

    def auth_flow(self, request: httpx2.Request) -> Generator[httpx2.Request, httpx2.Response]:
        token = self._token if isinstance(self._token, str) else self._token()
        if token and _is_of(request.url, self._home):
            request.headers["Authorization"] = f"Bearer {token}"
        yield request


def _is_of(url: httpx2.URL, registry: httpx2.URL) -> bool:
    """Whether the registry itself answers there, and not the store behind it."""
    return (url.scheme, url.netloc) == (registry.scheme, registry.netloc)


def _moment(text: str) -> datetime:
    """An HTTP date."""
    moment = parsedate_to_datetime(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def line_path(name: RepositoryName, kind: str = "adapter") -> str:
    """Path of a repository in the API."""
    return f"/v1/{kind}s/{name}"


def read(answer: type[Answer], path: str, document: Mapping[str, Any]) -> Answer:
    """The document of an answer. Raises Invalid, with the path and the field, if it is not of this form."""
    try:
        return answer.read(document)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        why = f"lacks {field}" if first["type"] == "missing" else f"has a wrong {field}: {first['msg']}"
        raise untrusted("bad_answer", f"{path} {why}") from error


def _as(answer: type[Answer] | None, path: str, document: Json) -> Answer | Json:
    return document if answer is None else read(answer, path, document)


@contextmanager
def understood(path: str) -> Generator[None]:
    """Raises Invalid, with the path, for an answer that cannot be read."""
    try:
        yield
    except (KeyError, ValueError, RecursionError) as error:
        raise untrusted("bad_answer", f"{path}: {type(error).__name__} {error}") from error


def untrusted(code: str, why: str) -> Invalid:
    """The error for an answer that is malformed or not about what was requested."""
    return Invalid(
        code,
        f"The registry's answer cannot be trusted: {why.rstrip('.')}.",
        next_step="Check ADAPTORY_URL, and inform the registry's operators (adaptory fsck finds what is damaged).",
    )


def refuse_other_answer(asked: Reference, release: NamedRelease) -> None:
    """Raises Invalid for a release that the reference does not name.

    Which version of a range is the highest, and which one a channel serves, only the registry knows.
    """
    with understood(release.path):
        is_asked = (
            release.repository == str(asked.repository)
            and (asked.version is None or release.version == str(asked.version))
            and (asked.range is None or parse_version(release.version) in asked.range)
            and release.commit.startswith(asked.commit or "")
        )
    if not is_asked:
        answered = f"{release.repository[:160]}:{release.version[:80]} {release.commit[:40]}"
        raise untrusted("other_release", f"it answered {asked} with {answered}")


def _lines(chunks: Iterable[bytes]) -> Generator[str]:
    """Splits at line feeds only: JSON may contain other characters that Unicode counts as line ends. Raises Invalid for
    a line that is too long, or is not UTF-8."""
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        if len(rest) > _MAX_LINE_BYTES:
            raise untrusted("bad_answer", f"a line has more than {_MAX_LINE_BYTES:,} bytes")
        yield from map(_text, lines)
    if rest:
        yield _text(rest)


def _text(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise untrusted("bad_answer", "a line is not UTF-8") from error


def _exactly(size_bytes: int, chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yields the chunks. Raises Invalid for a different number of bytes: a request that ends early would look like an
    interrupted one."""
    left = size_bytes
    for chunk in chunks:
        left -= len(chunk)
        if left < 0:
            break
        yield chunk
    if left:
        raise Invalid(
            "size_differs",
            f"There are {'more' if left < 0 else 'fewer'} bytes to send than the {size_bytes:,} that were announced.",
            next_step="Check that no process is writing to the file, and push again.",
        )


@contextmanager
def _translate_transport_errors(url: str, *, changes: bool = False) -> Generator[None]:
    try:
        yield
    except httpx2.RequestError as error:
        lost = changes and not isinstance(error, _UNSENT)
        check = "whether the change was made anyway" if lost else "ADAPTORY_URL"
        raise Unavailable(
            "answer_lost" if lost else "registry_unreachable",
            f"{url.partition('?')[0]} does not answer: {str(error).rstrip('.')}.",
            next_step=f"Check that the server is running, and check {check}.",
        ) from error


def answer_lost(error: Unavailable) -> bool:
    """Recognizes an unknown outcome: the request was interrupted, or a proxy answered for the registry."""
    return error.code == "answer_lost" or error.code.startswith("http_5")


def _is_problem(response: httpx2.Response) -> bool:
    return response.headers.get("content-type", "").startswith("application/problem+json")


class _Refusal(Wire):
    """The part of a `Problem` that the client uses: a proxy's may lack the rest."""

    code: str
    detail: str
    family: str = ""
    subject: str = ""
    next: str = ""
    findings: tuple[Json, ...] = ()


def _raise_problem(response: httpx2.Response) -> None:
    if response.status_code < 400:
        return
    wait = _wait(response.headers.get("retry-after", ""))
    if not _is_problem(response):
        raise Unavailable(
            f"http_{response.status_code}",
            f"{response.url.host} answered {response.status_code} without saying why.",
            next_step=f"Wait {wait}, and try again." if wait else "Look at the log of the server.",
        )
    problem = read(_Refusal, response.url.path, _document(response))
    raise _family(response.status_code, problem.family)(
        problem.code,
        problem.detail,
        subject=problem.subject,
        next_step=problem.next.replace("as long as Retry-After says", wait or "a while"),
        findings=problem.findings,
    )


def _document(response: httpx2.Response) -> Json:
    """The object that an answer has. Raises Invalid for anything else."""
    with understood(response.url.path):
        document = response.json()
    if not isinstance(document, dict):
        raise untrusted("bad_answer", f"{response.url.path} is not a JSON object")
    return cast(Json, document)


def _wait(retry_after: str) -> str:
    """The time to wait, from a header with seconds or a date; empty if it has neither."""
    if retry_after.strip().isdecimal():
        return f"{retry_after.strip()} s"
    try:
        left_s = _moment(retry_after) - datetime.now(UTC)
    except (ValueError, TypeError, OverflowError):
        return ""
    return f"{max(1, round(left_s.total_seconds())):,} s"


def _family(status: int, name: str) -> type[RegistryError]:
    """The family that the problem names, else (older servers) the one of the status."""
    if status >= 500:
        return Unavailable
    named = [family for family in FAMILIES if family.family == name]
    matching = [family for family in FAMILIES if family.status == status]
    return (named or matching or [Invalid])[0]
