"""What routes have in common: unknown parameters are refused, what is asked again is read once, and a document only
after its sender may send it."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from difflib import get_close_matches
from functools import lru_cache, partial, wraps
from typing import Any, TypeVar, cast

from fastapi import Request, Response
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute
from starlette.datastructures import QueryParams

from registry.api.http.request import document, limit_bytes
from registry.api.http.rules import Rule, Where, rules_of
from registry.domain.access.roles import Role
from registry.errors import Invalid, RegistryError, TooLarge, Unavailable, Usage

T = TypeVar("T")
Handler = Callable[[Request], Coroutine[Any, Any, Response]]

BYTES_A_VALUE = 16
"""At the least, in the longest document that is taken. A base has one in 25."""
MAX_QUERIES, MAX_QUERY_BYTES = 256, 500
"""Of each route, whoever asks: some 20 MB for all of them together at the most."""
DIRECT_THREADS = 16
"""Fewer than there are connections to the database: slow searches leave some to everything else."""
DIRECT_PATIENCE_S = 5.0
"""Who has waited longer for one of them is told so: those that were asked before may have waited for the database."""
_threads = ThreadPoolExecutor(DIRECT_THREADS, "direct")


def cached_by_query(read: Callable[[bytes], T]) -> Callable[[bytes], T]:
    """Keeps what a query says: who deploys asks the same again and again. Long ones are read each time."""
    kept = lru_cache(MAX_QUERIES)(read)

    @wraps(read)
    def read_once(query: bytes) -> T:
        return kept(query) if len(query) <= MAX_QUERY_BYTES else read(query)

    return read_once


class Route(APIRoute):
    """Raises Usage for a parameter that the route does not know: of a misspelt condition nothing would be said, and
    everything be told that it was to leave out. And for a NUL, which PostgreSQL does not take. TooLarge for a document
    of very many values."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        rules = rules_of(self.dependant)
        self.responses = {**_errors(self, rules), **self.responses}
        security: list[dict[str, list[str]]] = [{"bearer": []}] if rules else []
        if any(rule.role is Role.READER and rule.where is not Where.ANYWHERE for rule in rules):
            security.append({})  # what is public needs no token
        self.openapi_extra = {"security": security, **(self.openapi_extra or {})}

    def get_route_handler(self) -> Handler:
        answer, known = self._answer(), self._parameters()
        is_known = cached_by_query(partial(_is_known, known))
        rules = rules_of(self.dependant) if self.body_field else None

        async def handle(request: Request) -> Response:
            query: bytes = request.scope["query_string"]
            if query and not is_known(query):
                raise _refusal(request, known)
            if rules is not None:
                for rule in rules:
                    await rule.before_document(request)
                _refuse_many_values(await document(request), limit_bytes(request) // BYTES_A_VALUE)
            return await answer(request)

        return handle

    def _answer(self) -> Handler:
        return super().get_route_handler()

    def _parameters(self) -> tuple[str, ...]:
        """Those of the query: what the route declares, and what it reads by itself."""
        described = (self.openapi_extra or {}).get("parameters", [])
        return (*_declared(self.dependant), *(one["name"] for one in described if one["in"] == "query"))


class ThreadedRoute(Route):
    """A route that is given the request and what depends on nothing else, makes its own response, and runs in a thread.

    The framework takes longer to find that out anew, and to reach its threads, than a database to answer.
    """

    def _answer(self) -> Handler:
        answer, own = cast(Callable[..., Response], self.dependant.call), str(self.dependant.request_param_name)
        needs = [(str(one.name), cast(Callable[[Request], Any], one.call)) for one in self.dependant.dependencies]

        async def handle(request: Request) -> Response:
            given = {name: await find(request) for name, find in needs} | {own: request}
            asked = time.monotonic()

            def run() -> Response:
                if time.monotonic() - asked > DIRECT_PATIENCE_S:
                    raise _busy()
                return answer(**given)

            return await asyncio.get_running_loop().run_in_executor(_threads, run)

        return handle


_ERRORS: dict[int, str] = {
    400: "The request is not one that this route knows.",
    401: "It needs a token, or this one is not in force.",
    403: "The caller may not do this.",
    404: "There is no such thing that the caller may see.",
    409: "It contradicts what is there.",
    412: "The precondition (`If-Match`, `If-None-Match`) does not hold.",
    413: "The body is too large.",
    422: "What was sent is invalid, or a check or a gate refuses it.",
    429: "Too many requests; `Retry-After` says when to ask again.",
    503: "The database, the store or the disk is away; `Retry-After` says when to ask again.",
}


def _errors(route: APIRoute, rules: Sequence[Rule]) -> dict[int | str, dict[str, Any]]:
    """The statuses of errors that a route may answer with, by what it is asked and whom it lets in."""
    methods = set(route.methods or ())
    changes = bool(methods - {"GET", "HEAD"})
    holds = {
        400: True,
        401: bool(rules),
        403: bool(rules) and (changes or any(rule.where is not Where.NAMESPACE for rule in rules)),
        404: "{" in route.path or any(rule.where is Where.INSIDE for rule in rules),
        409: changes,
        412: any(one.alias.lower() in ("if-match", "if-none-match") for one in _headers(route.dependant)),
        413: changes and (route.body_field is not None or "PUT" in methods),
        422: bool(changes or route.dependant.query_params or "{" in route.path or route.dependant.dependencies),
        429: bool(rules),
        503: True,
    }
    return {status: {"description": _ERRORS[status]} for status, may in holds.items() if may}


def _headers(dependant: Dependant) -> list[Any]:
    return [*dependant.header_params, *(one for child in dependant.dependencies for one in _headers(child))]


def _refuse_many_values(body: bytes, most: int) -> None:
    """An empty list is three bytes on its way and eighty as an object. Characters are counted, those in texts too."""
    if sum(map(body.count, (b",", b"[", b"{"))) > most:
        message = f"The body has more than {most:,} commas and opening brackets."
        next_step = f"Send less, or let an operator raise ADAPTORY_MAX_DOCUMENT_BYTES: one counts for {BYTES_A_VALUE}."
        raise TooLarge("body_too_large", message, next_step=next_step)


def _busy() -> Unavailable:
    return Unavailable(
        "searches_busy",
        f"{DIRECT_THREADS} searches were running for {DIRECT_PATIENCE_S:g} s and longer.",
        next_step="Ask again in as many seconds as Retry-After says; /readyz tells whether the database answers.",
    )


def _declared(dependant: Dependant) -> list[str]:
    own = [one.alias for one in dependant.query_params]
    return own + [name for child in dependant.dependencies for name in _declared(child)]


def _is_known(known: tuple[str, ...], query: bytes) -> bool:
    return _odd(known, query) is None


def _odd(known: tuple[str, ...], query: bytes) -> str | None:
    """The first parameter that the route does not know, or that has a NUL."""
    asked = QueryParams(query).multi_items()
    return next((name for name, value in asked if name not in known or "\0" in value), None)


def _refusal(request: Request, known: tuple[str, ...]) -> RegistryError:
    name = (_odd(known, request.scope["query_string"]) or "")[:80]
    if name in known:
        return Invalid("bad_value", f"{name} has a NUL.", subject=name, next_step="Leave it out.")
    meant = get_close_matches(name, known, 1)
    there_are = f"There are {', '.join(known)}." if known else "Leave it out."
    return Usage(
        "unknown_parameter",
        f"{request.method} {request.url.path[:200]} has no parameter {name!r}.",
        subject=name,
        next_step=f"Did you mean {meant[0]}?" if meant else there_are,
    )
