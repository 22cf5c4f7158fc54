"""Channels, their moves and gates, for both adapters and models."""

from typing import Annotated, Any

from fastapi import Header, Query, Request, Response

from registry.api.http.pagination import Cursor, Limit, decode_cursor, decode_number, etag, expected_from, page
from registry.api.http.request import RequestKey, ResourcesOf, RowId, idempotent_request
from registry.api.http.routes import Route
from registry.api.http.rules import Admin, Publisher, Reader, Releaser
from registry.api.routes.documents import json_response, move_document
from registry.api.routes.repository import NamedRepository, RepositoryOf, RepositoryRouter
from registry.api.routes.views import channel_view, judgement_view, move_view, policy_view, promotion_view
from registry.database import idempotency
from registry.database.engine import Session
from registry.database.tables import Promotion
from registry.domain.channels import deletion, moves, pending, promotions
from registry.domain.channels.policy import policies
from registry.domain.channels.serving import (
    ChannelMove,
    channels_of_repository,
    find_channel,
    moves_of_channel,
    moves_of_release,
)
from registry.formats.channel_policy import read_policy
from registry.formats.references import parse_name, parse_version
from registry.transfer.promotions import settle, settle_overdue
from registry.wire.document import Page
from registry.wire.quality import (
    ApprovalIn,
    ApprovalOut,
    ChannelDeleted,
    ChannelOut,
    ExceptionIn,
    GatesIn,
    GatesOut,
    JudgementOut,
    MoveOut,
    PolicyOut,
    PromoteIn,
    PromotionOut,
    RollbackIn,
    WithdrawnApprovalOut,
)

repository_routes = RepositoryRouter(tags=["channels"], route_class=Route)

CHANNEL = "/{namespace}/{name}/channels/{channel}"
IfMatch = Annotated[str | None, Header(description="The channel's ETag that you last saw.")]
VersionQuery = Annotated[str, Query(max_length=100)]
IfNew = Annotated[str | None, Header(alias="If-None-Match", description="`*`: only if the channel does not exist yet.")]
IfNoneMatch = Annotated[str | None, Header(description="The channel's ETag that you last saw.")]


@repository_routes.get("/{namespace}/{name}/channels")
def list_channels(
    named: RepositoryOf,
    resources: ResourcesOf,
    actor: Reader,
    version: Annotated[str | None, Query(max_length=100, description="Only channels that serve it.")] = None,
    limit: Limit = 50,
    cursor: Cursor = None,
) -> Page[ChannelOut]:
    with resources.snapshot() as session:
        repository = named.find(session)
        served = named.release(session, version) if version else None
        rows = channels_of_repository(session, repository, served=served, after=decode_cursor(cursor), limit=limit + 1)
        items = [channel_view(session, row, repository) for row in rows]
        return page(items, limit, [row.name for row in rows])


@repository_routes.get(CHANNEL, response_model=ChannelOut, responses={304: {}})
def show_channel(
    named: RepositoryOf,
    channel: str,
    resources: ResourcesOf,
    actor: Reader,
    response: Response,
    if_none_match: IfNoneMatch = None,
) -> Any:
    """The channel, and what it serves now. 304 if that is as it was with the ETag of `If-None-Match`."""
    with resources.snapshot() as session:
        repository = named.find(session)
        row = find_channel(session, repository, channel)
        view = channel_view(session, row, repository)
    tag = etag(view.move, view.version)
    if if_none_match is not None and tag in if_none_match.replace("W/", ""):
        return Response(status_code=304, headers={"ETag": tag})
    response.headers["ETag"] = tag
    return view


@repository_routes.put(CHANNEL, response_model=MoveOut, responses={202: {"model": PromotionOut}})
def promote(  # noqa: PLR0913
    named: RepositoryOf,
    channel: str,
    body: PromoteIn,
    resources: ResourcesOf,
    actor: Releaser,
    request: Request,
    if_match: IfMatch = None,
    if_none_match: IfNew = None,
    key: RequestKey = None,
) -> Response:
    """422 with the numbers if a gate fails; 412 if the channel no longer has the given ETag. 202 if the release lacks
    only what may still come, such as a score: the promotion then completes or fails automatically.
    """
    asked = idempotent_request(request, actor, key, body)
    wanted = moves.PromotionRequest(
        named.name,
        parse_version(body.version),
        channel,
        named.kind,
        reason=body.reason,
        force=body.force,
        expected=expected_from(if_match, if_none_match),
    )
    with resources.write() as session:
        made = idempotency.claim_key(session, asked, actor.at)
        if made:
            outcome = _made(session, named, channel, made)
        else:
            outcome = promotions.request(session, actor, wanted)
            kind = "move" if isinstance(outcome, ChannelMove) else "promotion"
            idempotency.store_answer(session, asked, {kind: outcome.id})
        if isinstance(outcome, Promotion):
            return Response(promotion_view(outcome).model_dump_json(), 202, media_type="application/json")
    return json_response(move_document(outcome, named.name, channel), ETag=etag(outcome.id, outcome.to_version))


def _made(session: Session, named: NamedRepository, channel: str, made: dict[str, int]) -> ChannelMove | Promotion:
    """The answer of an earlier request with the same key."""
    if "move" in made:
        return _move(session, named, channel, made["move"])
    return pending.find(session, named.find(session), channel, made["promotion"])


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
            repository = named.find(session)
            move = moves.roll_back(session, actor, repository, channel, to=to, reason=body.reason, expected=expected)
            idempotency.store_answer(session, asked, {"move": move.id})
    return json_response(move_document(move, named.name, channel), ETag=etag(move.id, move.to_version))


def _move(session: Session, named: NamedRepository, channel: str, move_id: int) -> ChannelMove:
    row = find_channel(session, named.find(session), channel)
    return moves_of_channel(session, row, before=move_id + 1, limit=1)[0]


@repository_routes.delete(CHANNEL)
def delete(
    named: RepositoryOf,
    channel: str,
    resources: ResourcesOf,
    actor: Releaser,
    serving: Annotated[str | None, Query(max_length=100, description="The version that it serves.")] = None,
    reason: Annotated[str, Query(max_length=1000)] = "",
) -> ChannelDeleted:
    """Delete a channel without a policy. One that serves a release is refused, unless an admin names that release and
    states a reason.
    """
    known = parse_version(serving) if serving else None
    with resources.write() as session:
        served = deletion.delete_channel(session, actor, named.find(session), channel, serving=known, reason=reason)
        return ChannelDeleted(repository=str(named.name), channel=channel, served=served)


@repository_routes.get(CHANNEL + "/history")
def history(
    named: RepositoryOf, channel: str, resources: ResourcesOf, actor: Reader, limit: Limit = 50, cursor: Cursor = None
) -> Page[MoveOut]:
    """List the channel's moves, newest first."""
    with resources.read() as session:
        row = find_channel(session, named.find(session), channel)
        rows = moves_of_channel(session, row, before=decode_number(cursor), limit=limit + 1)
        return page([move_view(move, named.name, channel) for move in rows], limit, [move.id for move in rows])


@repository_routes.get("/{namespace}/{name}/releases/{version}/moves")
def list_moves_of_release(
    named: RepositoryOf,
    version: str,
    resources: ResourcesOf,
    actor: Reader,
    limit: Limit = 50,
    cursor: Cursor = None,
) -> Page[MoveOut]:
    """List the moves of all channels to this release and away from it, newest first."""
    with resources.read() as session:
        release = named.release(session, version)
        rows = moves_of_release(session, release, before=decode_number(cursor), limit=limit + 1)
        items = [move_view(move, named.name, channel) for channel, move in rows]
        return page(items, limit, [move.id for _, move in rows])


@repository_routes.get(CHANNEL + "/judgement")
def judge(
    named: RepositoryOf, channel: str, version: VersionQuery, resources: ResourcesOf, actor: Reader, response: Response
) -> JudgementOut:
    """Judge a promotion of the version to the channel now, with the result of each rule. Changes nothing. A
    channel that does not exist yet is judged as an empty one."""
    wanted = moves.PromotionRequest(named.name, parse_version(version), channel, named.kind)
    with resources.snapshot() as session:
        judgement = promotions.judge(session, actor, wanted)
    response.headers["ETag"] = etag(judgement.move, judgement.served)
    return judgement_view(judgement, wanted)


@repository_routes.get(CHANNEL + "/promotions")
def list_promotions(
    named: RepositoryOf, channel: str, resources: ResourcesOf, actor: Reader, limit: Limit = 50, cursor: Cursor = None
) -> Page[PromotionOut]:
    """List the promotions to the channel that wait or have waited, newest first."""
    settle_overdue(resources, named.name, named.kind, channel)
    with resources.read() as session:
        rows = pending.list_page(session, named.find(session), channel, before=decode_number(cursor), limit=limit + 1)
        return page([promotion_view(row) for row in rows], limit, [row.id for row in rows])


@repository_routes.get(CHANNEL + "/promotions/{promotion_id}")
def show_promotion(
    named: RepositoryOf, channel: str, promotion_id: RowId, resources: ResourcesOf, actor: Reader
) -> PromotionOut:
    settle_overdue(resources, named.name, named.kind, channel)
    with resources.read() as session:
        return promotion_view(pending.find(session, named.find(session), channel, promotion_id))


@repository_routes.post(CHANNEL + "/promotions/{promotion_id}/cancel")
def cancel_promotion(
    named: RepositoryOf, channel: str, promotion_id: RowId, resources: ResourcesOf, actor: Releaser
) -> PromotionOut:
    """Cancel a waiting promotion, and its evaluation if nothing else needs that."""
    with resources.write() as session:
        promotion = pending.find(session, named.find(session), channel, promotion_id)
        return promotion_view(promotions.cancel(session, actor, promotion))


@repository_routes.post(CHANNEL + "/approvals")
def approve(
    named: RepositoryOf, channel: str, body: ApprovalIn, resources: ResourcesOf, actor: Publisher
) -> ApprovalOut:
    """Approve a release for the channel, with the role that its policy requires. A promotion that waits for it is
    judged again."""
    with resources.write() as session:
        release = named.release(session, body.version)
        given = promotions.approve(session, actor, release, parse_name(channel, "channel"), body.reason)
        waiting = promotions.waiting_for(session, release, channel)
        waiting_id = waiting.id if waiting else None
    settle(resources, waiting_id)
    with resources.read() as session:
        promotion = None if waiting_id is None else promotion_view(session.get_one(Promotion, waiting_id))
    return ApprovalOut.of(given, repository=str(named.name), channel=channel, version=body.version, promotion=promotion)


@repository_routes.delete(CHANNEL + "/approvals/{version}")
def withdraw(
    named: RepositoryOf, channel: str, version: str, resources: ResourcesOf, actor: Publisher
) -> WithdrawnApprovalOut:
    """Withdraw one's own approval; `withdrawn` tells whether there was one."""
    with resources.write() as session:
        return WithdrawnApprovalOut(
            withdrawn=promotions.withdraw(session, actor, named.release(session, version), channel)
        )


@repository_routes.get(CHANNEL + "/policy")
def show_policy(named: RepositoryOf, channel: str, resources: ResourcesOf, actor: Reader) -> PolicyOut:
    """The channel's own policy, and that of its namespace with the exception from it, if there are any."""
    with resources.read() as session:
        return policy_view(session, named.find(session), channel, actor.at)


@repository_routes.put(CHANNEL + "/policy")
def set_policy(
    named: RepositoryOf, channel: str, body: dict[str, Any], resources: ResourcesOf, actor: Admin
) -> PolicyOut:
    """Replace the channel's policy, gate rules included. A promotion that waits is judged by the new one."""
    policy = read_policy(body, "policy")
    with resources.write() as session:
        repository = named.find(session)
        policies.set_policy(session, actor, policies.scope_of(repository, channel), policy)
        return policy_view(session, repository, channel, actor.at)


@repository_routes.put(CHANNEL + "/policy/exception")
def grant_exception(
    named: RepositoryOf, channel: str, body: ExceptionIn, resources: ResourcesOf, actor: Admin
) -> PolicyOut:
    """Exempt the channel from its namespace's policy until a time, in the place of an earlier exception."""
    with resources.write() as session:
        repository = named.find(session)
        policies.grant_exception(session, actor, repository, channel, body.until, body.reason)
        return policy_view(session, repository, channel, actor.at)


@repository_routes.delete(CHANNEL + "/policy/exception")
def end_exception(named: RepositoryOf, channel: str, resources: ResourcesOf, actor: Admin) -> PolicyOut:
    """End the channel's exception from its namespace's policy before its time."""
    with resources.write() as session:
        repository = named.find(session)
        policies.end_exception(session, actor, repository, channel)
        return policy_view(session, repository, channel, actor.at)


@repository_routes.get("/{namespace}/{name}/gates")
def show_gates(named: RepositoryOf, resources: ResourcesOf, actor: Reader) -> GatesOut:
    with resources.read() as session:
        rules = policies.all_rules(session, named.find(session))
        return GatesOut(gates={channel: [str(rule) for rule in listed] for channel, listed in rules.items()})


@repository_routes.put("/{namespace}/{name}/gates")
def set_gates(named: RepositoryOf, body: GatesIn, resources: ResourcesOf, actor: Admin) -> GatesOut:
    """Replace the rules of one channel, or pin them to the current content of their suites."""
    with resources.write() as session:
        repository = named.find(session)
        policies.set_rules(session, actor, policies.scope_of(repository, body.channel), body.rules, repin=body.repin)
        rules = policies.all_rules(session, repository)
        return GatesOut(gates={channel: [str(rule) for rule in listed] for channel, listed in rules.items()})
