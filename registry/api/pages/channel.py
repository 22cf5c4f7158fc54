"""A channel: what it serves since when and why, what a promotion to it needs, and every move."""

from typing import Any

from fastapi import APIRouter, Request, Response

from registry.api.http.pagination import Cursor, decode_number, first_rows
from registry.api.http.request import ResourcesOf
from registry.api.pages import gates, policy
from registry.api.pages.paths import ChannelOf, RepositoryOf
from registry.api.pages.render import page
from registry.api.pages.wire import PageReader, PageRoute
from registry.api.routes.views import channel_view, move_view, promotion_view
from registry.domain.access.roles import Role, holds
from registry.domain.catalog import repositories
from registry.domain.channels import moves, pending, policies
from registry.transfer.promotions import settle_overdue

router = APIRouter(route_class=PageRoute)

SHOWN = 25


@router.get("/{namespace}/{name}@{channel}")
def show_channel(
    named: RepositoryOf,
    channel: ChannelOf,
    request: Request,
    resources: ResourcesOf,
    actor: PageReader,
    cursor: Cursor = None,
) -> Response:
    settle_overdue(resources, named, None, channel)
    with resources.snapshot() as session:
        repository = repositories.find(session, named)
        row = moves.find(session, repository, channel)
        served = moves.effective_move(session, row)
        rows = moves.history(session, row, before=decode_number(cursor), limit=SHOWN + 1)
        listed, more = first_rows(rows, SHOWN, lambda move: move.id)
        views = [move_view(move, named, channel).model_dump(mode="json") for move in listed]
        needed, revision = policies.find(session, repository, channel)
        waiting = pending.of_channel(session, row.id)
        current = moves.history(session, row, before=0, limit=1)[0] if cursor else rows[0]
        values: dict[str, Any] = {
            "serving": channel_view(session, row, repository),
            "move": move_view(current, named, channel),
            "since": served.at if served else None,
            "kind": repository.kind,
            "waiting": promotion_view(waiting).model_dump(mode="json") if waiting else None,
        }
    return page(
        request,
        "channel.html",
        repository=str(named),
        namespace=named.namespace,
        name=named.name,
        channel=channel,
        timeline=[(move, gates.lines(move["gates"]), gates.summary(move["gates"])) for move in views],
        first=cursor is None,
        more=more,
        policy=policy.stated(needed),
        revision=revision,
        waiting_report=gates.lines(values["waiting"]["gates"]) if values["waiting"] else [],
        releaser=holds(actor, Role.RELEASER, str(named)),
        admin=holds(actor, Role.ADMIN, str(named)),
        json_address=f"/v1/{values['kind']}s/{named}/channels/{channel}",
        **values,
    )
