"""Forms that approve or cancel the waiting promotion of a channel.

Each form carries the promotion that its page showed. If that one has ended, nothing happens, and the page shows it.
"""

from fastapi import APIRouter, Response

from registry.api.pages.accounts.account import validated
from registry.api.pages.html import gates
from registry.api.pages.html.forms import Form, FormOf, number_shown
from registry.api.pages.html.render import page_about, redirect
from registry.api.pages.html.wire import (
    CHANNEL,
    ChannelRequest,
    ChannelRequestOf,
    PagePublisher,
    PageReleaser,
    PageRoute,
)
from registry.api.routes.views import promotion_view
from registry.database.engine import Session
from registry.database.tables import Promotion
from registry.domain.catalog import repositories
from registry.domain.channels import pending, promotions
from registry.errors import RegistryError
from registry.transfer.promotions import settle, settle_overdue
from registry.wire.quality import ApprovalIn

router = APIRouter(route_class=PageRoute)


@router.get(CHANNEL + "/approve")
def show_approval(asked: ChannelRequestOf, actor: PagePublisher) -> Response:
    """The waiting promotion, what it lacks, and the form that approves it."""
    return _page(asked, "approve.html")


@router.post(CHANNEL + "/approve")
def approve(asked: ChannelRequestOf, actor: PagePublisher, form: FormOf) -> Response:
    """Approves as REST does, with the role that the policy requires, then redirects to the channel's page."""
    try:
        with asked.resources.write() as session:
            promotion = _shown(session, asked, form)
            stated = {"version": promotion.release.version, "reason": form.get("reason", "").strip()}
            body: ApprovalIn = validated(ApprovalIn, stated)
            promotions.approve(session, actor, promotion.release, asked.channel, body.reason)
            promotion_id = promotion.id
    except RegistryError as error:
        return _page(asked, "approve.html", error)
    settle(asked.resources, promotion_id)
    return redirect(asked.address)


@router.get(CHANNEL + "/cancel")
def show_cancellation(asked: ChannelRequestOf, actor: PageReleaser) -> Response:
    """The waiting promotion, and the form that cancels it."""
    return _page(asked, "cancel.html")


@router.post(CHANNEL + "/cancel")
def cancel(asked: ChannelRequestOf, actor: PageReleaser, form: FormOf) -> Response:
    """Cancels as REST does, then redirects to the channel's page."""
    try:
        with asked.resources.write() as session:
            promotions.cancel(session, actor, _shown(session, asked, form))
    except RegistryError as error:
        return _page(asked, "cancel.html", error)
    return redirect(asked.address)


def _shown(session: Session, asked: ChannelRequest, form: Form) -> Promotion:
    """Returns the promotion that the form's page showed, if it still waits."""
    repository = repositories.find(session, asked.named)
    promotion = pending.find(session, repository, asked.channel, number_shown(form, "promotion"))
    pending.refuse_ended(promotion)
    return promotion


def _page(asked: ChannelRequest, template: str, error: RegistryError | None = None) -> Response:
    settle_overdue(asked.resources, asked.named, None, asked.channel)
    with asked.resources.snapshot() as session:
        row = pending.of_name(session, repositories.find(session, asked.named), asked.channel)
        waiting = promotion_view(row) if row else None
    report = gates.lines(waiting.gates) if waiting else []
    return page_about(
        asked.request, template, asked.named, error=error, channel=asked.channel, waiting=waiting, report=report
    )
