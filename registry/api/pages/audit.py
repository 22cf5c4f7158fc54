"""The audit log, for admins: what was changed, by whom, and why."""

from datetime import datetime
from typing import Annotated
from urllib.parse import urlencode

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import BeforeValidator

from registry.api.http.pagination import Cursor, decode_number, encode_cursor
from registry.api.http.request import Moment, ResourcesOf
from registry.api.http.rules import Where
from registry.api.pages.render import page
from registry.api.pages.wire import PageRoute, PageRule
from registry.api.routes.views import audit_view
from registry.domain.access import audit
from registry.domain.access.audit import Act, Actor, EventQuery
from registry.domain.access.roles import Role, granted

router = APIRouter(route_class=PageRoute)

SHOWN = 50
PageAdminSomewhere = Annotated[Actor, Depends(PageRule(Where.ANYWHERE, Role.ADMIN))]


def _filled(value: object) -> object:
    """An empty field of the form is ignored."""
    return value or None


Text = Annotated[str | None, BeforeValidator(_filled), Query(max_length=300)]
Time = Annotated[Moment | None, BeforeValidator(_filled), Query()]
Kind = Annotated[Act | None, BeforeValidator(_filled), Query()]


@router.get("/audit")
def show_audit(  # noqa: PLR0913
    request: Request,
    resources: ResourcesOf,
    actor: PageAdminSomewhere,
    namespace: Text = None,
    subject: Text = None,
    by: Text = None,
    act: Kind = None,
    since: Time = None,
    until: Time = None,
    cursor: Cursor = None,
) -> Response:
    """The rows that REST lists to this admin, newest first."""
    wanted = EventQuery(
        namespaces=granted(actor, Role.ADMIN),
        namespace=namespace,
        subject=subject,
        actor=by,
        act=act,
        since=since,
        until=until,
    )
    with resources.read() as session:
        rows = audit.list_newest_first(session, wanted, before=decode_number(cursor), limit=SHOWN + 1)
        listed = [audit_view(row) for row in rows[:SHOWN]]
    asked = {"namespace": namespace, "subject": subject, "by": by, "act": act, "since": _text(since)}
    given = {name: str(value) for name, value in {**asked, "until": _text(until)}.items() if value}
    more = urlencode({**given, "cursor": encode_cursor(rows[SHOWN - 1].id)}) if len(rows) > SHOWN else None
    address = "/v1/audit" + (f"?{urlencode(given)}" if given else "")
    return page(request, "audit.html", events=listed, asked=given, acts=list(Act), more=more, json_address=address)


def _text(at: datetime | None) -> str | None:
    return at.isoformat() if at else None
