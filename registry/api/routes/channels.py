"""Channels, their moves and gates, for both adapters and models."""

from typing import Annotated

from fastapi import Header, Request, Response

from registry.api.http.pagination import Cursor, Limit, decode_cursor, decode_number, etag, expected_from, page
from registry.api.http.request import RequestKey, ResourcesOf, idempotent_request
from registry.api.http.routes import Route
from registry.api.http.rules import Admin, Reader, Releaser
from registry.api.routes.documents import json_response, move_document
from registry.api.routes.repository import NamedRepository, RepositoryOf, RepositoryRouter
from registry.api.routes.views import channel_view, move_view
from registry.api.schemas.quality import ChannelOut, GatesIn, GatesOut, MoveOut, PromoteIn, RollbackIn
from registry.api.schemas.wire import Page
from registry.database import idempotency
from registry.database.engine import Session
from registry.domain.catalog import repositories
from registry.domain.channels import gates, moves
from registry.formats.references import parse_version

repository_routes = RepositoryRouter(tags=["channels"], route_class=Route)

CHANNEL = "/{namespace}/{name}/channels/{channel}"
IfMatch = Annotated[str | None, Header(description="The channel's ETag that you last saw.")]
IfNoneMatch = Annotated[str | None, Header(description="`*`: only if the channel does not exist yet.")]


@repository_routes.get("/{namespace}/{name}/channels")
def list_channels(
    named: RepositoryOf, resources: ResourcesOf, actor: Reader, limit: Limit = 50, cursor: Cursor = None
) -> Page[ChannelOut]:
    with resources.snapshot() as session:
        repository = repositories.find(session, named.name, named.kind)
        rows = moves.list_page(session, repository, after=decode_cursor(cursor), limit=limit + 1)
        items = [channel_view(session, row, repository) for row in rows]
        return page(items, limit, [row.name for row in rows])


@repository_routes.get(CHANNEL)
def show_channel(
    named: RepositoryOf, channel: str, resources: ResourcesOf, actor: Reader, response: Response
) -> ChannelOut:
    with resources.snapshot() as session:
        repository = repositories.find(session, named.name, named.kind)
        row = moves.find(session, repository, channel)
        response.headers["ETag"] = etag(row.move_id or 0)
        return channel_view(session, row, repository)


@repository_routes.put(CHANNEL, response_model=MoveOut)
def promote(  # noqa: PLR0913
    named: RepositoryOf,
    channel: str,
    body: PromoteIn,
    resources: ResourcesOf,
    actor: Releaser,
    request: Request,
    if_match: IfMatch = None,
    if_none_match: IfNoneMatch = None,
    key: RequestKey = None,
) -> Response:
    """422 with the numbers if a gate fails; 412 if the channel no longer has the given ETag."""
    expected, asked = expected_from(if_match, if_none_match), idempotent_request(request, actor, key, body)
    wanted = moves.PromotionRequest(named.name, parse_version(body.version), channel, named.kind)
    with resources.write() as session:
        made = idempotency.claim_key(session, asked, actor.at)
        if made:
            move = _move(session, named, channel, made["move"])
        else:
            move = moves.promote(session, actor, wanted, reason=body.reason, force=body.force, expected=expected)
            idempotency.store_answer(session, asked, {"move": move.id})
    return json_response(move_document(move, named.name, channel), ETag=etag(move.id))


@repository_routes.post(CHANNEL + "/rollback", response_model=MoveOut)
def roll_back(  # noqa: PLR0913
    named: RepositoryOf,
    channel: str,
    body: RollbackIn,
    resources: ResourcesOf,
    actor: Releaser,
    request: Request,
    if_match: IfMatch = None,
    key: RequestKey = None,
) -> Response:
    expected, asked = expected_from(if_match, None), idempotent_request(request, actor, key, body)
    to = parse_version(body.to) if body.to else None
    with resources.write() as session:
        made = idempotency.claim_key(session, asked, actor.at)
        if made:
            move = _move(session, named, channel, made["move"])
        else:
            repository = repositories.find(session, named.name, named.kind)
            move = moves.roll_back(session, actor, repository, channel, to=to, reason=body.reason, expected=expected)
            idempotency.store_answer(session, asked, {"move": move.id})
    return json_response(move_document(move, named.name, channel), ETag=etag(move.id))


def _move(session: Session, named: NamedRepository, channel: str, move_id: int) -> moves.ChannelMove:
    row = moves.find(session, repositories.find(session, named.name, named.kind), channel)
    return moves.history(session, row, before=move_id + 1, limit=1)[0]


@repository_routes.get(CHANNEL + "/history")
def history(
    named: RepositoryOf, channel: str, resources: ResourcesOf, actor: Reader, limit: Limit = 50, cursor: Cursor = None
) -> Page[MoveOut]:
    """List the channel's moves, newest first."""
    with resources.read() as session:
        repository = repositories.find(session, named.name, named.kind)
        row = moves.find(session, repository, channel)
        rows = moves.history(session, row, before=decode_number(cursor), limit=limit + 1)
        return page([move_view(move, named.name, channel) for move in rows], limit, [move.id for move in rows])


@repository_routes.get("/{namespace}/{name}/gates")
def show_gates(named: RepositoryOf, resources: ResourcesOf, actor: Reader) -> GatesOut:
    with resources.read() as session:
        rules = gates.all_rules(session, repositories.find(session, named.name, named.kind))
        return GatesOut(gates={channel: [str(rule) for rule in listed] for channel, listed in rules.items()})


@repository_routes.put("/{namespace}/{name}/gates")
def set_gates(named: RepositoryOf, body: GatesIn, resources: ResourcesOf, actor: Admin) -> GatesOut:
    """Replace the rules of one channel."""
    with resources.write() as session:
        repository = repositories.find(session, named.name, named.kind)
        gates.set_rules(session, actor, repository, body.channel, body.rules)
        rules = gates.all_rules(session, repository)
        return GatesOut(gates={channel: [str(rule) for rule in listed] for channel, listed in rules.items()})
