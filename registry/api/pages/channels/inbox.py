"""What waits for a person, on a page: promotions, which have a page to approve them, and changes, approved here."""

from fastapi import APIRouter, Request, Response

from registry.api.http.request import ResourcesOf, RowId
from registry.api.http.rules import CallersOf
from registry.api.pages.html.forms import FormOf
from registry.api.pages.html.render import page, redirect
from registry.api.pages.html.wire import PageAdmin, PageMember, PageRoute
from registry.api.routes.changes import approved
from registry.domain.changes import inbox, requests
from registry.errors.translation import of_row
from registry.formats.references import parse_name

router = APIRouter(route_class=PageRoute)

SHOWN = 100
_CHANGE = "/{namespace}/-/changes/{change_id}"


@router.get("/inbox")
def show_inbox(request: Request, resources: ResourcesOf, actor: PageMember) -> Response:
    """What is for the caller comes first."""
    with resources.read() as session:
        items, more = inbox.waiting(session, actor, SHOWN)
    own, others = [item for item in items if item.for_you], [item for item in items if not item.for_you]
    groups = [("For you", own), ("For others", others)]
    return page(request, "inbox.html", groups=groups, more=more, json_address="/v1/inbox")


@router.post(_CHANGE + "/approve")
def approve_change(
    namespace: str, change_id: RowId, resources: ResourcesOf, actor: PageAdmin, callers: CallersOf, form: FormOf
) -> Response:
    """Approves as REST does. A change that could not be made is shown as the error that ended it."""
    view = approved(resources, callers, actor, parse_name(namespace, "namespace"), change_id)
    if view.error is not None:
        raise of_row(view.error)
    return redirect("/inbox")


@router.post(_CHANGE + "/cancel")
def cancel_change(namespace: str, change_id: RowId, resources: ResourcesOf, actor: PageAdmin, form: FormOf) -> Response:
    with resources.write() as session:
        requests.cancel(session, actor, requests.find(session, parse_name(namespace, "namespace"), change_id))
    return redirect("/inbox")
