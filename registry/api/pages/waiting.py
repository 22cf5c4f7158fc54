"""Forms about the promotion that a channel waits for: one approves it, one cancels it.

Each form carries the promotion that its page showed. If that one has ended, nothing happens, and the page says so.
"""

from typing import Any

from fastapi import APIRouter, Request, Response

from registry.api.http.request import ResourcesOf
from registry.api.pages import gates
from registry.api.pages.account import validated
from registry.api.pages.forms import Form, FormOf, number_shown
from registry.api.pages.paths import ChannelOf, RepositoryOf
from registry.api.pages.render import form_page, link, redirect
from registry.api.pages.wire import PagePublisher, PageReleaser, PageRoute
from registry.api.routes.views import promotion_view
from registry.api.schemas.quality import ApprovalIn
from registry.database.engine import Session
from registry.database.tables import Promotion
from registry.domain.catalog import repositories
from registry.domain.channels import pending, promotions
from registry.errors import RegistryError
from registry.formats.references import RepositoryName
from registry.transfer.promotions import settle, settle_overdue
from registry.transfer.resources import Resources

router = APIRouter(route_class=PageRoute)

CHANNEL = "/{namespace}/{name}@{channel}"


@router.get(CHANNEL + "/approve")
def show_approval(
    named: RepositoryOf, channel: ChannelOf, request: Request, resources: ResourcesOf, actor: PagePublisher
) -> Response:
    """What waits and what it lacks, and the form that approves it."""
    return _page(request, resources, "approve.html", named, channel)


@router.post(CHANNEL + "/approve")
def approve(
    named: RepositoryOf,
    channel: ChannelOf,
    request: Request,
    resources: ResourcesOf,
    actor: PagePublisher,
    form: FormOf,
) -> Response:
    """Approves as REST does, with the role that the policy asks for, and goes on to the channel's page."""
    try:
        with resources.write() as session:
            promotion = _shown(session, named, channel, form)
            stated = {"version": promotion.release.version, "reason": form.get("reason", "").strip()}
            body: ApprovalIn = validated(ApprovalIn, stated)
            promotions.approve(session, actor, promotion.release, channel, body.reason)
            promotion_id = promotion.id
    except RegistryError as error:
        return _page(request, resources, "approve.html", named, channel, error)
    settle(resources, promotion_id)
    return redirect(link(str(named), channel=channel))


@router.get(CHANNEL + "/cancel")
def show_cancellation(
    named: RepositoryOf, channel: ChannelOf, request: Request, resources: ResourcesOf, actor: PageReleaser
) -> Response:
    """What waits, and the form that cancels it."""
    return _page(request, resources, "cancel.html", named, channel)


@router.post(CHANNEL + "/cancel")
def cancel(
    named: RepositoryOf,
    channel: ChannelOf,
    request: Request,
    resources: ResourcesOf,
    actor: PageReleaser,
    form: FormOf,
) -> Response:
    """Cancels as REST does, and goes on to the channel's page."""
    try:
        with resources.write() as session:
            promotions.cancel(session, actor, _shown(session, named, channel, form))
    except RegistryError as error:
        return _page(request, resources, "cancel.html", named, channel, error)
    return redirect(link(str(named), channel=channel))


def _shown(session: Session, named: RepositoryName, channel: str, form: Form) -> Promotion:
    """The promotion that the form's page showed, which still waits."""
    repository = repositories.find(session, named)
    promotion = pending.find(session, repository, channel, number_shown(form, "promotion"))
    pending.refuse_ended(promotion)
    return promotion


def _page(
    request: Request,
    resources: Resources,
    template: str,
    named: RepositoryName,
    channel: str,
    error: RegistryError | None = None,
) -> Response:
    settle_overdue(resources, named, None, channel)
    with resources.snapshot() as session:
        row = pending.of_name(session, repositories.find(session, named), channel)
        waiting: dict[str, Any] | None = promotion_view(row).model_dump(mode="json") if row else None
    report = gates.lines(waiting["gates"]) if waiting else []
    return form_page(request, template, named, error, channel=channel, waiting=waiting, report=report)
