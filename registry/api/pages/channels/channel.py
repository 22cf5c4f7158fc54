"""A channel: what it serves, since when and why, what a promotion to it needs, and all its moves."""

from typing import Any

from fastapi import APIRouter, Response

from registry.api.http.pagination import Cursor, decode_number, first_rows
from registry.api.pages.channels import policy, rollout
from registry.api.pages.html import gates
from registry.api.pages.html.render import page_about
from registry.api.pages.html.wire import CHANNEL, ChannelRequestOf, PageReader, PageRoute
from registry.api.routes.views import canary_view, channel_view, move_view, promotion_view, rollout_view
from registry.database.engine import Session
from registry.database.tables import Canary, Promotion, Repository
from registry.domain.access.audit import Actor
from registry.domain.access.roles import Role, holds
from registry.domain.catalog import releases, repositories
from registry.domain.channels import pending
from registry.domain.channels.policy import policies
from registry.domain.channels.serving import ChannelMove, find_channel, moves_of_channel, serving_move
from registry.domain.rollouts import canaries
from registry.formats.references import RepositoryName
from registry.transfer.promotions import settle_overdue

router = APIRouter(route_class=PageRoute)

SHOWN, MAX_VERSIONS = 25, 50


@router.get(CHANNEL)
def show_channel(asked: ChannelRequestOf, actor: PageReader, cursor: Cursor = None) -> Response:
    """A channel to which nothing has been promoted has a page once it has a policy or a waiting promotion."""
    named, channel = asked.named, asked.channel
    settle_overdue(asked.resources, named, None, channel)
    releaser = holds(actor, Role.RELEASER, str(named))
    with asked.resources.snapshot() as session:
        repository = repositories.find(session, named)
        in_force = policies.in_force(session, repository, channel, actor.at)
        own = policies.find(session, policies.scope_of(repository, channel))
        exception = policies.exception_of(session, repository, channel, actor.at)
        waiting = pending.of_name(session, repository, channel)
        empty = (own.revision > 0 or waiting is not None) and not repositories.has_channel(session, repository, channel)
        facts = dict(_EMPTY) if empty else _moved(session, actor, repository, channel, cursor)
        facts |= _awaited(actor, named, in_force, waiting)
        served = facts["serving"].version if facts["serving"] else None
        highest = releases.list_page(session, repository, before="", limit=MAX_VERSIONS) if releaser else []
        facts["versions"] = [row.version for row in highest if not row.yanked and row.version != served]
        changed = list(policies.changes_since(session, own.pins).values())
        address = f"/v1/{repository.kind}s/{named}/channels/{channel}"
    return page_about(
        asked.request,
        "channel.html",
        named,
        channel=channel,
        first=cursor is None,
        policies=[(scope, policy.stated(needed)) for scope, needed in in_force.items()],
        exception=exception,
        revision=own.revision,
        changed=changed,
        releaser=releaser,
        admin=holds(actor, Role.ADMIN, str(named)),
        json_address=f"{address}/policy" if empty else address,
        **facts,
    )


def _awaited(
    actor: Actor, named: RepositoryName, in_force: policies.InForce, waiting: Promotion | None
) -> dict[str, Any]:
    """The waiting promotion, its report, and whether the viewer can approve it."""
    if waiting is None:
        return {"waiting": None, "waiting_report": [], "approver": False}
    shown = promotion_view(waiting)
    unapproved = any(gate.rule.startswith("approval by ") and not gate.passed for gate in shown.gates)
    wanted = policies.approver(in_force) if waiting.actor != actor.name else None
    may = unapproved and wanted is not None and holds(actor, wanted, str(named))
    return {"waiting": shown, "waiting_report": gates.lines(shown.gates), "approver": may}


_EMPTY: dict[str, Any] = {
    **dict.fromkeys(("serving", "move", "since", "more", "rollout", "canary")),
    "timeline": [],
}


def _is_of_now(canary: Canary, last: ChannelMove) -> bool:
    """Whether a canary runs, or was rolled back since the channel's last move."""
    if canary.state == pending.RUNNING:
        return True
    return canary.state == pending.ROLLED_BACK and canary.ended_at is not None and canary.ended_at >= last.at


def _moved(session: Session, actor: Actor, repository: Repository, channel: str, cursor: str | None) -> dict[str, Any]:
    """The release that the channel serves, since when and why, which nodes serve it, and a page of its moves."""
    named, row = repositories.name_of(repository), find_channel(session, repository, channel)
    served, canary = serving_move(session, row), canaries.latest(session, row)
    rows = moves_of_channel(session, row, before=decode_number(cursor), limit=SHOWN + 1)
    listed, more = first_rows(rows, SHOWN, lambda move: move.id)
    views = [move_view(move, named, channel) for move in listed]
    [current] = moves_of_channel(session, row, before=(row.move_id or 0) + 1, limit=1)
    return {
        "serving": channel_view(session, row, repository),
        "move": move_view(current, named, channel),
        "since": served.at if served else None,
        "timeline": [(move, gates.lines(move.gates), gates.summary(move.gates)) for move in views],
        "more": more,
        "canary": canary_view(session, actor, canary, named, channel)
        if canary and _is_of_now(canary, current)
        else None,
        "rollout": rollout.shown(rollout_view(session, actor, row, repository), actor.at),
    }
