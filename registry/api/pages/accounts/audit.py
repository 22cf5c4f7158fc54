"""The audit log, for admins: what was changed, by whom, and why."""

from typing import Annotated
from urllib.parse import urlencode

from fastapi import APIRouter, Depends, Request, Response

from registry.api.http.pagination import Cursor, decode_number, first_rows
from registry.api.http.request import ResourcesOf
from registry.api.http.rules import Where
from registry.api.pages.accounts.account import validated
from registry.api.pages.html.render import page
from registry.api.pages.html.wire import PageRoute, PageRule, parses
from registry.api.routes.views import audit_view
from registry.api.schemas.work import EventFilters
from registry.domain.access import audit
from registry.domain.access.audit import Act, Actor
from registry.domain.access.roles import Role

router = APIRouter(route_class=PageRoute)

SHOWN = 50
PageAdminSomewhere = Annotated[Actor, Depends(PageRule(Where.ANYWHERE, Role.ADMIN))]


@router.get("/audit", openapi_extra=parses(*EventFilters.model_fields))
def show_audit(request: Request, resources: ResourcesOf, actor: PageAdminSomewhere, cursor: Cursor = None) -> Response:
    """The rows that REST lists to this admin, newest first. Empty fields of the form are ignored."""
    given = {name: value for name, value in request.query_params.items() if value and name in EventFilters.model_fields}
    filters: EventFilters = validated(EventFilters, given)
    with resources.read() as session:
        before = decode_number(cursor)
        rows = audit.list_newest_first(session, filters.query(actor), before=before, limit=SHOWN + 1)
        listed, following = first_rows(rows, SHOWN, lambda row: row.id)
        views = [audit_view(row) for row in listed]
    more = urlencode({**given, "cursor": following}) if following else None
    address = "/v1/audit" + (f"?{urlencode(given)}" if given else "")
    return page(request, "audit.html", events=views, asked=given, acts=list(Act), more=more, json_address=address)
