"""Search across repositories, and resolve: the two most frequent requests."""

import hashlib
import json
from dataclasses import asdict, dataclass
from types import NoneType
from typing import Annotated, cast

import orjson
from fastapi import APIRouter, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.datastructures import QueryParams

from composer.formats.adapters.serving import ServerProfile, loads
from registry.api.http.pagination import decode_cursor, encode_cursor
from registry.api.http.request import ResourcesOf
from registry.api.http.routes import Route, cached_by_query, needs_only_request
from registry.api.http.rules import Caller
from registry.api.http.threads import in_search_threads
from registry.api.routes.documents import (
    RenderedRelease,
    RenderedReleaseCache,
    deprecation,
    files_of,
    json_response,
    page_response,
)
from registry.api.routes.queries import SearchIn
from registry.database.engine import Session
from registry.domain.access.audit import Actor
from registry.domain.access.roles import Role, permit
from registry.domain.catalog import suites
from registry.domain.channels import resolve
from registry.domain.channels.resolve import ResolvedRow
from registry.domain.search import facets, search
from registry.domain.search.ordering import NEWEST, RANK, SIZE, VERSION, Order, Position
from registry.domain.search.search import SearchResult
from registry.errors import Usage
from registry.formats.references import parse_reference
from registry.transfer.resources import Resources
from registry.wire.document import MAX_INT64, Problem
from registry.wire.search import FoundPage, ResolvedOut

router = APIRouter(prefix="/v1", tags=["search"], route_class=Route)

NO_REMARKS = b'{"related":null,"loads_in":null}'
PARAMETERS = [
    {"name": name, "in": "query", "required": False, "schema": schema}
    for name, schema in SearchIn.model_json_schema()["properties"].items()
]


@dataclass(frozen=True, slots=True)
class Results:
    """A page of results: documents as FoundOut, the ids of their releases, the cursor of the next page, the choices of
    each facet."""

    documents: list[bytes]
    release_ids: list[int]
    following: str | None
    facets: dict[str, object]


@cached_by_query
def _parse_query(query: bytes) -> tuple[SearchIn, search.Query]:
    """Parses the parameters. The framework would need longer for this many than most searches run in total."""
    given: dict[str, list[str]] = {}
    for name, value in QueryParams(query).multi_items():
        given.setdefault(name, []).append(value)
    try:
        read = SearchIn.model_validate(given)
    except ValidationError as error:
        raise RequestValidationError(
            [{**problem, "loc": ("query", *problem["loc"])} for problem in error.errors()]
        ) from error
    return read, read.parse()


@router.get(
    "/releases",
    response_model=FoundPage,
    responses={422: {"model": Problem}},
    openapi_extra={"parameters": PARAMETERS},
)
@needs_only_request
@in_search_threads
def search_releases(request: Request, resources: ResourcesOf, actor: Caller) -> Response:
    """Search the releases that the caller may read; all conditions must hold."""
    results = find_releases(
        resources, actor, request.scope["query_string"], cast(RenderedReleaseCache, request.app.state.documents)
    )
    return page_response(results.documents, results.following, results.facets)


def find_releases(resources: Resources, actor: Actor, asked: bytes, documents: RenderedReleaseCache) -> Results:
    """Runs the search that a query string describes."""
    query, wanted = _parse_query(asked)
    order = Order(query.sort, query.limit + 1, _position(query))
    # Conditions on a release's neighbours are evaluated in one statement and checked in another.
    at_one_moment = wanted.channel is not None or wanted.latest
    with resources.snapshot() if at_one_moment else resources.read() as session:
        result = _search(session, actor, query, wanted, order)
        rendered = _render(session, actor, documents, result, query.limit)
    # The releases may have changed between the search and the rendering.
    if any(release.stamp != hit.stamp for release, hit in zip(rendered, result.hits, strict=False)):
        with resources.snapshot() as session:
            result = _search(session, actor, query, wanted, order)
            rendered = _render(session, actor, documents, result, query.limit)
    matching = [release.with_remarks(_remarks(release, result, wanted.loads_in)) for release in rendered]
    following = None
    if len(result.hits) > len(rendered):
        last = result.hits[len(rendered) - 1]
        following = encode_cursor(json.dumps([_fingerprint(query), last.key, last.release_id]))
    counted: dict[str, object] = {}
    if query.facets:
        with resources.read() as session:
            counted = {
                name: [asdict(choice) for choice in facets.choices(session, actor, wanted, name)]
                for name in query.facets
            }
    return Results(matching, [hit.release_id for hit in result.hits[: len(rendered)]], following, counted)


def _search(session: Session, actor: Actor, query: SearchIn, wanted: search.Query, order: Order) -> SearchResult:
    result = search.search(session, actor, wanted, order)
    if not result.hits and not query.cursor and actor.grants:  # no matches: perhaps a metric is misspelt
        for suite, metric in _metrics(query, wanted):
            suites.refuse_unknown_metric(session, actor, suite, metric)
    return result


def _render(
    session: Session, actor: Actor, documents: RenderedReleaseCache, result: SearchResult, limit: int
) -> list[RenderedRelease]:
    return documents.page(session, actor, {hit.release_id: hit.stamp for hit in result.hits[:limit]})


@router.get("/resolve", response_model=ResolvedOut)
def resolve_reference(ref: Annotated[str, Query(max_length=400)], resources: ResourcesOf, actor: Caller) -> Response:
    reference = parse_reference(ref)
    permit(actor, Role.READER, reference.repository.namespace)
    with resources.read() as session:
        row = resolve.resolve_exact(session, reference)
    if row is None:
        with resources.snapshot() as session:
            row = resolve.locate(session, reference)
    return json_response(_resolved(row))


def _resolved(resolved: ResolvedRow) -> dict[str, object]:
    """A ResolvedOut from columns validated when written: validating again would cost more than reading them."""
    row = resolved.row
    release = {
        "repository": f"{row.namespace}/{row.repository}",
        "kind": row.kind,
        "version": row.version,
        "commit": row.commit,
        "base": {"digest": row.base_digest, "name": row.base_name},
        "yanked": row.yanked,
        "yank_reason": row.yank_reason,
        "deprecated": deprecation(row.deprecated_reason, row.successor),
        "base_deprecated": deprecation(row.base_deprecated_reason, row.base_successor),
        "size_bytes": row.size_bytes,
        "files": files_of(row.manifest),
    }
    return {"release": release, "warning": resolved.warning}


def _metrics(query: SearchIn, wanted: search.Query) -> list[tuple[str, str]]:
    """Suite and metric of each score in the conditions or the sort order."""
    asked = [(condition.suite, condition.metric) for condition in wanted.score]
    suite, dot, metric = query.sort.rpartition(".")
    return [*asked, (suite, metric)] if dot else asked


def _fingerprint(query: SearchIn) -> str:
    """A digest of everything that determines the results and their order; a cursor is valid only for that."""
    asked = query.model_dump_json(exclude={"limit", "cursor", "facets"}, exclude_defaults=True)
    return hashlib.sha256(asked.encode()).hexdigest()[:12]


def _position(query: SearchIn) -> Position | None:
    if query.cursor is None:
        return None
    try:
        fingerprint, key, release_id = json.loads(decode_cursor(query.cursor))
    except (ValueError, TypeError):
        fingerprint, key, release_id = None, None, 0
    kind = {NEWEST: NoneType, VERSION: str, SIZE: int, RANK: int}.get(query.sort, float)
    valid = type(key) is kind and type(release_id) is int and 0 < release_id <= MAX_INT64
    valid = valid and not (isinstance(key, int) and abs(key) > MAX_INT64)
    if not valid or fingerprint != _fingerprint(query):
        raise Usage(
            "bad_cursor",
            "The cursor does not belong to this search.",
            subject=query.cursor[:80],
            next_step="Repeat the search that returned it, with the same conditions and order.",
        )
    return Position(key, release_id)


def _remarks(row: RenderedRelease, result: SearchResult, profile: ServerProfile | None) -> bytes:
    """The fields that FoundOut adds: whether the release is for a related base, and whether the server loads it."""
    if not profile and not (result.base and result.relations[row.base_digest]):
        return NO_REMARKS
    related = loading = None
    if result.base and (relation := result.relations[row.base_digest]):
        digest, name = result.base
        related = {"base": {"digest": digest, "name": name}, "relation": relation}
    if profile:
        loading = loads(row.servers, json.loads(row.loading), row.rank_max or 0, profile).to_json()
    return orjson.dumps({"related": related, "loads_in": loading})
