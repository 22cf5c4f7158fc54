"""Forms that move a channel: promotion, with its gates judged beforehand, and rollback.

Each form carries the move that its page showed. If the channel has moved since, nothing happens, and the page shows
what it serves now.
"""

from fastapi import APIRouter, Response

from registry.api.pages.accounts.account import validated
from registry.api.pages.html import gates
from registry.api.pages.html.forms import FormOf, number_shown
from registry.api.pages.html.render import page_about, redirect
from registry.api.pages.html.wire import CHANNEL, ChannelRequest, ChannelRequestOf, PageReleaser, PageRoute, VersionOf
from registry.api.routes.views import judgement_view
from registry.domain.access.audit import Actor
from registry.domain.catalog import repositories
from registry.domain.channels import moves, pending, promotions
from registry.domain.channels.policy.judging import Expected, PromotionRequest
from registry.domain.channels.serving import current_move, earlier_versions, find_channel, move_before, serving_move
from registry.errors import RegistryError, Usage
from registry.formats.references import parse_version
from registry.wire.quality import PromoteIn, RollbackIn

router = APIRouter(route_class=PageRoute)

SHOWN = 200
"""The maximum number of versions that the rollback form offers."""


@router.get(CHANNEL + "/promote")
def show_promotion(asked: ChannelRequestOf, version: VersionOf, actor: PageReleaser) -> Response:
    """The outcome of a promotion, judged now, and the form that requests it."""
    return _promotion_page(asked, actor, PromotionRequest(asked.named, version, asked.channel))


@router.post(CHANNEL + "/promote")
def promote(asked: ChannelRequestOf, actor: PageReleaser, form: FormOf) -> Response:
    """Promotes as REST does, then redirects to the channel's page."""
    force, reason = form.get("force") == "yes", form.get("reason", "").strip()
    body: PromoteIn = validated(PromoteIn, {"version": form.get("version", ""), "reason": reason, "force": force})
    wanted = PromotionRequest(
        asked.named,
        parse_version(body.version),
        asked.channel,
        reason=body.reason,
        force=force,
        expected=Expected(number_shown(form, "expected")),
    )
    try:
        if force and not reason:
            raise _no_reason("A forced promotion")
        with asked.resources.write() as session:
            promotions.request(session, actor, wanted)
    except RegistryError as error:
        return _promotion_page(asked, actor, wanted, error)
    return redirect(asked.address)


@router.get(CHANNEL + "/rollback")
def show_rollback(asked: ChannelRequestOf, actor: PageReleaser) -> Response:
    """The release that the channel serves, and the form that returns to an earlier one."""
    return _rollback_page(asked, RollbackIn(reason=""))


@router.post(CHANNEL + "/rollback")
def roll_back(asked: ChannelRequestOf, actor: PageReleaser, form: FormOf) -> Response:
    """Rolls back as REST does, then redirects to the channel's page."""
    reason = form.get("reason", "").strip()
    body: RollbackIn = validated(RollbackIn, {"to": form.get("to") or None, "reason": reason})
    to, expected = parse_version(body.to) if body.to else None, Expected(number_shown(form, "expected"))
    try:
        if not reason:
            raise _no_reason("A rollback")
        with asked.resources.write() as session:
            repository = repositories.find(session, asked.named)
            moves.roll_back(session, actor, repository, asked.channel, to=to, reason=body.reason, expected=expected)
    except RegistryError as error:
        return _rollback_page(asked, body, error)
    return redirect(asked.address)


def _promotion_page(
    asked: ChannelRequest, actor: Actor, wanted: PromotionRequest, error: RegistryError | None = None
) -> Response:
    with asked.resources.snapshot() as session:
        judgement = judgement_view(promotions.judge(session, actor, wanted), wanted)
        waiting = pending.of_name(session, repositories.find(session, asked.named), asked.channel)
        replaced = waiting.release.version if waiting else None
    return page_about(
        asked.request,
        "promote.html",
        asked.named,
        error=error,
        channel=asked.channel,
        version=str(wanted.version),
        judgement=judgement,
        report=gates.lines(judgement.gates),
        replaced=replaced,
        reason=wanted.reason,
    )


def _rollback_page(asked: ChannelRequest, typed: RollbackIn, error: RegistryError | None = None) -> Response:
    with asked.resources.snapshot() as session:
        row = find_channel(session, repositories.find(session, asked.named), asked.channel)
        current, served = current_move(session, row), serving_move(session, row)
        below = move_before(session, current)
        values = {
            "serves": served.to_release.version if served else None,
            "expected": current.id,
            "before": below.to_release.version if below else None,
            "versions": earlier_versions(session, current, limit=SHOWN),
        }
    return page_about(
        asked.request, "rollback.html", asked.named, error=error, channel=asked.channel, typed=typed, **values
    )


def _no_reason(what: str) -> Usage:
    return Usage(
        "reason_missing", f"{what} needs a reason.", subject="reason", next_step="Say why; the history keeps it."
    )
