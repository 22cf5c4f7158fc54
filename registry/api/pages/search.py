"""The first page, and search with the parameters of `GET /v1/releases`."""

from typing import cast
from urllib.parse import parse_qsl, urlencode

import orjson
from fastapi import APIRouter, Request, Response

from registry.api.http.request import ResourcesOf
from registry.api.http.threads import in_search_threads
from registry.api.pages.render import page
from registry.api.pages.wire import PageCaller, PageRoute
from registry.api.routes.documents import Json, RenderedReleaseCache
from registry.api.routes.search import PARAMETERS, find_releases
from registry.domain.access.audit import Actor
from registry.domain.channels import moves
from registry.transfer.resources import Resources

router = APIRouter(route_class=PageRoute)

SHOWN, SUGGESTED, MOVES = 25, 25, 5


@router.get("/")
@in_search_threads
def home(request: Request, resources: ResourcesOf, actor: PageCaller) -> Response:
    """Search, the newest releases, and the last moves of channels."""
    items, _ = _releases(request, resources, actor, [("limit", "10")])
    with resources.read() as session:
        latest = moves.latest(session, actor, limit=MOVES)
    return page(request, "home.html", releases=items, moves=latest, json_address="/v1/releases?limit=10")


@router.get("/search", openapi_extra={"parameters": PARAMETERS})
@in_search_threads
def search(request: Request, resources: ResourcesOf, actor: PageCaller) -> Response:
    """Matching releases, by the parameters of REST. Empty fields of the form are ignored."""
    given = [(name, value) for name, value in parse_qsl(request.url.query) if value]
    limited = given if any(name == "limit" for name, _ in given) else [*given, ("limit", str(SHOWN))]
    items, following = _releases(request, resources, actor, limited)
    without_cursor = [(name, value) for name, value in given if name != "cursor"]
    more = f"/search?{urlencode([*without_cursor, ('cursor', following)])}" if following else None
    refused = urlencode([*without_cursor, ("include", "refused")])
    address = f"/v1/releases?{urlencode(limited)}"
    answer = page(
        request,
        "search.html",
        releases=items,
        more=more,
        asked=_asked(given),
        refused_query=refused,
        json_address=address,
    )
    if "hx-request" in request.headers:  # the form sends its empty fields too
        answer.headers["HX-Replace-Url"] = f"/search?{urlencode(without_cursor)}" if without_cursor else "/search"
    return answer


def known_adapters(
    request: Request, resources: Resources, actor: Actor, base: str | None = None
) -> list[tuple[str, str]]:
    """Adapters to suggest, of a base if one is given: each repository's highest stable release, and its base."""
    given = [("latest", "true"), ("limit", str(SUGGESTED)), *([("base", base)] if base else [])]
    items, _ = _releases(request, resources, actor, given)
    return [(f"{one['repository']}:{one['version']}", one["base"]["name"]) for one in items]


def _releases(
    request: Request, resources: Resources, actor: Actor, given: list[tuple[str, str]]
) -> tuple[list[Json], str | None]:
    documents = cast(RenderedReleaseCache, request.app.state.documents)
    items, following = find_releases(resources, actor, urlencode(given).encode(), documents)
    return [orjson.loads(item) for item in items], following


def _asked(given: list[tuple[str, str]]) -> dict[str, str]:
    """What the form shows: each field's value, several with commas."""
    values: dict[str, list[str]] = {}
    for name, value in given:
        values.setdefault(name, []).append(value)
    return {name: ", ".join(several) for name, several in values.items()}
