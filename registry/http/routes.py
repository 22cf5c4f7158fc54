"""What routes have in common: unknown parameters are refused, what is asked again is read once, and a document only
after its sender may send it."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from difflib import get_close_matches
from functools import lru_cache, partial, wraps
from typing import Any, TypeVar, cast

from fastapi import Request, Response
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute
from starlette.datastructures import QueryParams

from registry.errors import TooLarge, Unavailable, Usage
from registry.http.request import document, limit_bytes
from registry.http.rules import rules_of

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


def once(read: Callable[[bytes], T]) -> Callable[[bytes], T]:
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

    def get_route_handler(self) -> Handler:
        answer, known = self._answer(), self._parameters()
        is_known = once(partial(_is_known, known))
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


class Direct(Route):
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


def _refusal(request: Request, known: tuple[str, ...]) -> Usage:
    name = (_odd(known, request.scope["query_string"]) or "")[:80]
    if name in known:
        return Usage("bad_value", f"{name} has a NUL.", subject=name, next_step="Leave it out.")
    meant = get_close_matches(name, known, 1)
    there_are = f"There are {', '.join(known)}." if known else "Leave it out."
    return Usage(
        "unknown_parameter",
        f"{request.method} {request.url.path[:200]} has no parameter {name!r}.",
        subject=name,
        next_step=f"Did you mean {meant[0]}?" if meant else there_are,
    )
