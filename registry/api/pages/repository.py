"""Namespaces, and repositories with their channels and releases."""

import orjson
from fastapi import APIRouter, Request, Response

from registry.api.http.pagination import Cursor, decode_cursor, encode_cursor
from registry.api.http.request import ResourcesOf
from registry.api.pages import scores
from registry.api.pages.render import page
from registry.api.pages.wire import PageReader, PageRoute
from registry.api.routes.documents import release_documents
from registry.api.routes.views import channel_view, repository_page
from registry.domain.access import namespaces
from registry.domain.access.roles import Role, holds
from registry.domain.catalog import releases, repositories
from registry.domain.catalog.repositories import Wanted
from registry.domain.channels import moves
from registry.formats.references import parse_name, parse_repository

router = APIRouter(route_class=PageRoute)

SHOWN, MAX_CHANNELS = 20, 100


@router.get("/{namespace}")
def show_namespace(
    namespace: str, request: Request, resources: ResourcesOf, actor: PageReader, cursor: Cursor = None
) -> Response:
    name = parse_name(namespace, "namespace")
    wanted = Wanted(namespace=name)
    with resources.snapshot() as session:
        rows = repositories.list_page(session, actor, wanted, after=decode_cursor(cursor), limit=SHOWN + 1)
        listed = [one.model_dump(mode="json") for one in repository_page(session, rows[:SHOWN])]
        members = namespaces.members(session, name) if holds(actor, Role.ADMIN, name) else None
    more = encode_cursor(str(repositories.name_of(rows[SHOWN - 1]))) if len(rows) > SHOWN else None
    roles = [role.value for role in Role]
    return page(request, "namespace.html", namespace=name, repositories=listed, more=more, members=members, roles=roles)


@router.get("/{namespace}/{name}")
def show_repository(
    namespace: str, name: str, request: Request, resources: ResourcesOf, actor: PageReader, cursor: Cursor = None
) -> Response:
    """Channels first, with what each serves, then the releases."""
    named = parse_repository(f"{namespace}/{name}")
    with resources.snapshot() as session:
        row = repositories.find(session, named)
        served = moves.list_page(session, row, after="", limit=MAX_CHANNELS)
        _kept = moves.load_current(session, *served)
        channels = [channel_view(session, one, row) for one in served]
        rows = releases.list_page(session, row, before=decode_cursor(cursor), limit=SHOWN + 1)
        listed = [orjson.loads(one) for one in release_documents(session, actor, [one.id for one in rows[:SHOWN]])]
        newest = next((one for one in rows if not one.yanked), None) if cursor is None else None
        drawn = scores.histories(session, newest) if newest else []
        summary = repository_page(session, [row])[0]
        more = encode_cursor(rows[SHOWN - 1].sort_key) if len(rows) > SHOWN else None
    return page(
        request,
        "repository.html",
        repository=str(named),
        namespace=named.namespace,
        name=named.name,
        summary=summary,
        channels=channels,
        histories=drawn,
        releases=listed,
        more=more,
        json_address=f"/v1/{summary.kind}s/{named}",
    )
