"""The first page, and search with the parameters of `GET /v1/releases`."""

from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, cast
from urllib.parse import parse_qsl, urlencode

from fastapi import APIRouter, Request, Response

from registry.api.http.problems import as_registry_error
from registry.api.http.request import ResourcesOf
from registry.api.http.routes import needs_only_request
from registry.api.http.threads import in_search_threads
from registry.api.pages.html.render import page
from registry.api.pages.html.wire import ERRORS, PageCaller, PageRoute
from registry.api.routes.documents import RenderedReleaseCache
from registry.api.routes.search import PARAMETERS, Results, find_releases
from registry.domain.access.audit import Actor
from registry.domain.channels.serving import channels_of, latest_moves
from registry.transfer.resources import Resources
from registry.wire.search import FoundOut

router = APIRouter(route_class=PageRoute)

SHOWN, SUGGESTED, MOVES, COUNTED = 25, 25, 5, 100


@dataclass(frozen=True, slots=True)
class NotLoading:
    """Releases that match, but that the requested server cannot load."""

    number: int
    """Their number among the first COUNTED matches; with `more`, there may be others."""
    more: bool
    query: str
    """The address of the search that includes them."""


@router.get("/")
@needs_only_request
@in_search_threads
def home(request: Request, resources: ResourcesOf, actor: PageCaller) -> Response:
    """Search, the newest releases, and the last moves of channels."""
    results = _find(request, resources, actor, [("limit", "10")])
    with resources.read() as session:
        latest, serving = (
            latest_moves(session, actor, limit=MOVES),
            channels_of(session, results.release_ids),
        )
    facts: dict[str, Any] = {**_rows(results, serving), "moves": latest}
    return page(request, "home.html", **facts, json_address="/v1/releases?limit=10")


@router.get("/search", openapi_extra={"parameters": PARAMETERS})
@needs_only_request
@in_search_threads
def search(request: Request, resources: ResourcesOf, actor: PageCaller) -> Response:
    """Matching releases, by the parameters of REST. Empty fields of the form are ignored, and so is `include=related`
    without a base."""
    given = [(name, value) for name, value in parse_qsl(request.url.query) if value]
    if "base" not in dict(given):
        given = [pair for pair in given if pair != ("include", "related")]
    limited = given if any(name == "limit" for name, _ in given) else [*given, ("limit", str(SHOWN))]
    try:
        results = _find(request, resources, actor, limited)
    except ERRORS as raised:  # the form keeps what it was sent
        error = as_registry_error(raised)
        if error.status >= HTTPStatus.INTERNAL_SERVER_ERROR or "text/html" not in request.headers.get("accept", ""):
            raise
        nothing: dict[str, Any] = {"releases": [], "serving": {}, "more": None, "not_loading": None}
        return page(request, "search.html", status=error.status, error=error, asked=_asked(given), **nothing)
    without_cursor = [(name, value) for name, value in given if name != "cursor"]
    more = f"/search?{urlencode([*without_cursor, ('cursor', results.following)])}" if results.following else None
    with resources.read() as session:
        serving = channels_of(session, results.release_ids)
    facts: dict[str, Any] = {**_rows(results, serving), "more": more, "asked": _asked(given)}
    facts["not_loading"] = _not_loading(request, resources, actor, without_cursor)
    return page(request, "search.html", error=None, **facts, json_address=f"/v1/releases?{urlencode(limited)}")


def known_adapters(
    request: Request, resources: Resources, actor: Actor, base: str | None = None
) -> list[tuple[str, str]]:
    """Adapters to suggest, restricted to a base if one is given: each repository's highest stable release, and its
    base."""
    given = [("latest", "true"), ("limit", str(SUGGESTED)), *([("base", base)] if base else [])]
    items = _read(_find(request, resources, actor, given))
    return [(release.name, release.base.name) for release in items]


def _find(request: Request, resources: Resources, actor: Actor, given: list[tuple[str, str]]) -> Results:
    documents = cast(RenderedReleaseCache, request.app.state.documents)
    return find_releases(resources, actor, urlencode(given).encode(), documents)


def _read(results: Results) -> list[FoundOut]:
    return [FoundOut.model_validate_json(document) for document in results.documents]


def _rows(results: Results, serving: Mapping[int, list[str]]) -> dict[str, Any]:
    """The arguments of `parts.release_rows`."""
    items = _read(results)
    rows = zip(items, results.release_ids, strict=True)
    channels = {(item.repository, item.version): serving.get(release, []) for item, release in rows}
    return {"releases": items, "serving": channels}


def _not_loading(
    request: Request, resources: Resources, actor: Actor, given: list[tuple[str, str]]
) -> NotLoading | None:
    """The releases that the search omits because the server refuses them; None if it omits none."""
    if "loads_in" not in dict(given) or ("include", "refused") in given:
        return None
    asked = [*given, ("include", "refused")]
    counted = [(name, value) for name, value in asked if name != "limit"]
    results = _find(request, resources, actor, [*counted, ("limit", str(COUNTED))])
    number = sum(release.loads_in is not None and not release.loads_in.loads for release in _read(results))
    return NotLoading(number, results.following is not None, urlencode(asked)) if number else None


def _asked(given: list[tuple[str, str]]) -> dict[str, str]:
    """The values of the form's fields, several joined by commas."""
    values: dict[str, list[str]] = {}
    for name, value in given:
        values.setdefault(name, []).append(value)
    return {name: ", ".join(several) for name, several in values.items()}
