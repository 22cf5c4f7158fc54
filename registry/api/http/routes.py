"""The route class: refuses unknown parameters, parses repeated queries once, reads a body only after authorization."""

from collections.abc import Awaitable, Callable, Coroutine, Sequence
from difflib import get_close_matches
from functools import lru_cache, wraps
from typing import Any, TypeVar, cast

from fastapi import Request, Response
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.datastructures import QueryParams

from registry.api.http.request import document, limit_bytes
from registry.api.http.rules import Rule, Where, rules_of
from registry.domain.access.roles import Role
from registry.errors import Invalid, RegistryError, TooLarge, Usage

T = TypeVar("T")
Handler = Callable[[Request], Coroutine[Any, Any, Response]]
Endpoint = TypeVar("Endpoint", bound=Callable[..., Awaitable[Response]])

BYTES_A_VALUE = 16
"""Minimum bytes per JSON value in the longest accepted document; a base has 25."""
MAX_QUERIES, MAX_QUERY_BYTES = 256, 500
"""Cached queries per route: at most about 20 MB for all routes."""
_needing_only_request: set[Callable[..., Any]] = set()


def cached_by_query(read: Callable[[bytes], T]) -> Callable[[bytes], T]:
    """Caches parsed queries, which deployments repeat; long ones are parsed each time."""
    kept = lru_cache(MAX_QUERIES)(read)

    @wraps(read)
    def read_once(query: bytes) -> T:
        return kept(query) if len(query) <= MAX_QUERY_BYTES else read(query)

    return read_once


def needs_only_request(endpoint: Endpoint) -> Endpoint:
    """Marks an asynchronous endpoint that returns a Response and whose dependencies need only the request.

    It is called without the framework's dependency resolution, with which a search takes 10 to 13 % more CPU time
    (RESULTS.md, "What a search costs a server").
    """
    _needing_only_request.add(endpoint)
    return endpoint


class Route(APIRoute):
    """Raises Usage for an unknown parameter: a misspelt filter would otherwise be ignored silently and return
    everything. Also for a NUL, which PostgreSQL does not accept. Raises TooLarge for a body with too many values."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        rules = rules_of(self.dependant)
        self.responses = {**_errors(self, rules), **self.responses}
        security: list[dict[str, list[str]]] = [{"bearer": []}] if rules else []
        if any(rule.role is Role.READER and rule.where is not Where.ANYWHERE for rule in rules):
            security.append({})  # public data needs no token
        self.openapi_extra = {"security": security, **(self.openapi_extra or {})}

    def get_route_handler(self) -> Handler:
        direct = self.endpoint in _needing_only_request
        answer = _answer_directly(self.dependant) if direct else super().get_route_handler()
        known = self._parameters()
        is_known = cached_by_query(lambda query: _odd(known, query) is None)
        rules = rules_of(self.dependant) if self.body_field else None

        async def handle(request: Request) -> Response:
            query: bytes = request.scope["query_string"]
            if query and not is_known(query):
                raise _refusal(request, known)
            if rules is not None:
                await check_document(request, rules)
            return await answer(request)

        return handle

    def _parameters(self) -> tuple[str, ...]:
        """The query parameters that the route declares or parses itself."""
        described = (self.openapi_extra or {}).get("parameters", [])
        return (
            *_declared(self.dependant),
            *(parameter["name"] for parameter in described if parameter["in"] == "query"),
        )


async def check_document(request: Request, rules: Sequence[Rule]) -> None:
    """Authorizes the caller before the body is read, and counts its values before it is parsed: the framework would
    do both the other way round."""
    for rule in rules:
        await rule.before_document(request)
    _refuse_many_values(await document(request), limit_bytes(request) // BYTES_A_VALUE)


def _answer_directly(dependant: Dependant) -> Handler:
    answer, own = cast(Callable[..., Awaitable[Response]], dependant.call), str(dependant.request_param_name)
    needs = [(str(one.name), cast(Callable[[Request], Any], one.call)) for one in dependant.dependencies]

    async def handle(request: Request) -> Response:
        return await answer(**{own: request}, **{name: await find(request) for name, find in needs})

    return handle


_ERRORS: dict[int, str] = {
    400: "The request is malformed or has an unknown parameter.",
    401: "A token is required, or the given one is invalid.",
    403: "The caller may not do this.",
    404: "It does not exist, or the caller may not see it.",
    409: "The request conflicts with the current state.",
    412: "The precondition (`If-Match`, `If-None-Match`) does not hold.",
    413: "The body is too large.",
    422: "The content is invalid, or a check or gate refuses it.",
    429: "Too many requests; `Retry-After` states when to try again.",
    503: "The database, the store or the disk is unavailable; `Retry-After` states when to try again.",
}


def _errors(route: APIRoute, rules: Sequence[Rule]) -> dict[int | str, dict[str, Any]]:
    """The error statuses of a route, derived from its method, parameters and rules."""
    methods = set(route.methods or ())
    changes = bool(methods - {"GET", "HEAD"})
    holds = {
        400: True,
        401: bool(rules),
        403: bool(rules) and (changes or any(rule.where is not Where.NAMESPACE for rule in rules)),
        404: "{" in route.path or any(rule.where is Where.INSIDE for rule in rules),
        409: changes,
        412: any(header.alias.lower() in ("if-match", "if-none-match") for header in _headers(route.dependant)),
        413: changes and (route.body_field is not None or "PUT" in methods),
        422: bool(changes or route.dependant.query_params or "{" in route.path or route.dependant.dependencies),
        429: bool(rules),
        503: True,
    }
    return {status: {"description": _ERRORS[status]} for status, may in holds.items() if may}


def _headers(dependant: Dependant) -> list[Any]:
    return [*dependant.header_params, *(header for child in dependant.dependencies for header in _headers(child))]


def _refuse_many_values(body: bytes, most: int) -> None:
    """Refuses bodies with many values: an empty list is three bytes of JSON and eighty in memory. The count includes
    characters inside strings."""
    if sum(map(body.count, (b",", b"[", b"{"))) > most:
        message = f"The body has more than {most:,} commas and opening brackets."
        next_step = f"Send less, or ask an operator to raise ADAPTORY_MAX_DOCUMENT_BYTES ({BYTES_A_VALUE} for each)."
        raise TooLarge("body_too_large", message, next_step=next_step)


def _declared(dependant: Dependant) -> list[str]:
    """The query parameters of a route; those of a model are its fields."""
    own = [
        name
        for parameter in dependant.query_params
        for name in _names(parameter.alias, parameter.field_info.annotation)
    ]
    return own + [name for child in dependant.dependencies for name in _declared(child)]


def _names(alias: str, kind: object) -> list[str]:
    return [*kind.model_fields] if isinstance(kind, type) and issubclass(kind, BaseModel) else [alias]


def _odd(known: tuple[str, ...], query: bytes) -> str | None:
    """The first parameter that is unknown or contains a NUL."""
    asked = QueryParams(query).multi_items()
    return next((name for name, value in asked if name not in known or "\0" in value), None)


def _refusal(request: Request, known: tuple[str, ...]) -> RegistryError:
    name = (_odd(known, request.scope["query_string"]) or "")[:80]
    if name in known:
        return Invalid("bad_value", f"{name} contains a NUL character.", subject=name)
    meant = get_close_matches(name, known, 1)
    there_are = f"There are {', '.join(known)}." if known else "Leave it out."
    return Usage(
        "unknown_parameter",
        f"{request.method} {request.url.path[:200]} has no parameter {name!r}.",
        subject=name,
        next_step=f"Did you mean {meant[0]}?" if meant else there_are,
    )
