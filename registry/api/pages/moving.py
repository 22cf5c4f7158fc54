"""Forms that move a channel: promotion, with its gates judged before, and rollback.

Each form carries the move that its page showed. If the channel has moved since, nothing happens, and the page says what
it serves now.
"""

from typing import Any

from fastapi import APIRouter, Request, Response

from registry.api.http.request import ResourcesOf
from registry.api.pages import gates
from registry.api.pages.account import validated
from registry.api.pages.forms import FormOf, number_shown
from registry.api.pages.paths import ChannelOf, RepositoryOf, VersionOf
from registry.api.pages.render import form_page, link, redirect
from registry.api.pages.wire import PageReleaser, PageRoute
from registry.api.routes.views import judgement_view
from registry.api.schemas.quality import PromoteIn, RollbackIn
from registry.database.engine import Session
from registry.domain.access.audit import Actor
from registry.domain.catalog import repositories
from registry.domain.channels import judgements, moves, pending, promotions
from registry.domain.channels.refusals import Expected, PromotionRequest
from registry.errors import RegistryError, Usage
from registry.formats.references import RepositoryName, parse_version
from registry.transfer.resources import Resources

router = APIRouter(route_class=PageRoute)

CHANNEL = "/{namespace}/{name}@{channel}"
SHOWN = 200
"""The most versions that a rollback may choose from."""


@router.get(CHANNEL + "/promote")
def show_promotion(
    named: RepositoryOf,
    channel: ChannelOf,
    version: VersionOf,
    request: Request,
    resources: ResourcesOf,
    actor: PageReleaser,
) -> Response:
    """What the promotion would lead to, and the form that makes it."""
    wanted = PromotionRequest(named, version, channel)
    return _promotion_page(request, resources, actor, wanted)


@router.post(CHANNEL + "/promote")
def promote(
    named: RepositoryOf,
    channel: ChannelOf,
    request: Request,
    resources: ResourcesOf,
    actor: PageReleaser,
    form: FormOf,
) -> Response:
    """Promotes as REST does, and goes on to the channel's page."""
    force, reason = form.get("force") == "yes", form.get("reason", "").strip()
    body: PromoteIn = validated(PromoteIn, {"version": form.get("version", ""), "reason": reason, "force": force})
    wanted = PromotionRequest(
        named,
        parse_version(body.version),
        channel,
        reason=body.reason,
        force=force,
        expected=Expected(number_shown(form, "expected")),
    )
    try:
        if force and not reason:
            raise _no_reason("A forced promotion")
        with resources.write() as session:
            promotions.request(session, actor, wanted)
    except RegistryError as error:
        return _promotion_page(request, resources, actor, wanted, error)
    return redirect(link(str(wanted.repository), channel=wanted.channel))


@router.get(CHANNEL + "/rollback")
def show_rollback(
    named: RepositoryOf, channel: ChannelOf, request: Request, resources: ResourcesOf, actor: PageReleaser
) -> Response:
    """What the channel serves, and the form that returns to an earlier release."""
    return _rollback_page(request, resources, named, channel, RollbackIn(reason=""))


@router.post(CHANNEL + "/rollback")
def roll_back(
    named: RepositoryOf,
    channel: ChannelOf,
    request: Request,
    resources: ResourcesOf,
    actor: PageReleaser,
    form: FormOf,
) -> Response:
    """Rolls back as REST does, and goes on to the channel's page."""
    reason = form.get("reason", "").strip()
    body: RollbackIn = validated(RollbackIn, {"to": form.get("to") or None, "reason": reason})
    to, expected = parse_version(body.to) if body.to else None, Expected(number_shown(form, "expected"))
    try:
        if not reason:
            raise _no_reason("A rollback")
        with resources.write() as session:
            repository = repositories.find(session, named)
            moves.roll_back(session, actor, repository, channel, to=to, reason=body.reason, expected=expected)
    except RegistryError as error:
        return _rollback_page(request, resources, named, channel, body, error)
    return redirect(link(str(named), channel=channel))


def _promotion_page(
    request: Request,
    resources: Resources,
    actor: Actor,
    wanted: PromotionRequest,
    error: RegistryError | None = None,
) -> Response:
    with resources.snapshot() as session:
        judgement = judgement_view(judgements.judge(session, actor, wanted), wanted).model_dump(mode="json")
        waiting = pending.of_name(session, repositories.find(session, wanted.repository), wanted.channel)
        replaced = waiting.release.version if waiting else None
    return form_page(
        request,
        "promote.html",
        wanted.repository,
        error,
        channel=wanted.channel,
        version=str(wanted.version),
        judgement=judgement,
        report=gates.lines(judgement["gates"]),
        replaced=replaced,
        reason=wanted.reason,
    )


def _rollback_page(
    request: Request,
    resources: Resources,
    named: RepositoryName,
    channel: str,
    typed: RollbackIn,
    error: RegistryError | None = None,
) -> Response:
    with resources.snapshot() as session:
        repository = repositories.find(session, named)
        row = moves.find(session, repository, channel)
        current = moves.current_of(session, row)
        below = moves.previous_unyanked(session, current)
        values = {
            "serves": _served(session, row),
            "expected": current.id,
            "before": below.to_release.version if below else None,
            "versions": moves.earlier_versions(session, current, limit=SHOWN),
        }
    return form_page(request, "rollback.html", named, error, channel=channel, typed=typed, **values)


def _served(session: Session, row: Any) -> str | None:
    served = moves.effective_move(session, row)
    return served.to_release.version if served else None


def _no_reason(what: str) -> Usage:
    return Usage(
        "reason_missing", f"{what} needs a reason.", subject="reason", next_step="Say why; the history keeps it."
    )
