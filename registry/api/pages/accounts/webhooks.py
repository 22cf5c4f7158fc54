"""The webhooks of a namespace on a page: what each was sent last, and a form that sends it again."""

from fastapi import APIRouter, Request, Response

from registry.api.http.pagination import Cursor, decode_cursor, first_rows
from registry.api.http.request import MAX_DIGITS, ResourcesOf
from registry.api.pages.html.forms import FormOf
from registry.api.pages.html.render import page, redirect
from registry.api.pages.html.wire import PageAdmin, PageRoute
from registry.domain.access import namespaces
from registry.domain.webhooks import deliveries, hooks
from registry.errors import Usage
from registry.formats.references import parse_name
from registry.formats.webhooks import shown_url

router = APIRouter(route_class=PageRoute)

SHOWN = 20
DELIVERIES = 10
"""The number of deliveries to show for each webhook."""
_PAGE = "/{namespace}/-/webhooks"


@router.get(_PAGE)
def show_webhooks(
    namespace: str, request: Request, resources: ResourcesOf, actor: PageAdmin, cursor: Cursor = None
) -> Response:
    """No repository is called `-`."""
    name = parse_name(namespace, "namespace")
    with resources.read() as session:
        namespaces.find(session, name)
        rows = hooks.list_page(session, actor, namespace=name, after=decode_cursor(cursor), limit=SHOWN + 1)
        listed, more = first_rows(rows, SHOWN, lambda row: row.id)
        last = deliveries.last_of(session, [row.id for row in listed], DELIVERIES)
        signed = hooks.signed(session, listed)
    return page(
        request,
        "webhooks.html",
        namespace=name,
        hooks=[(row, shown_url(row.url, row.format), last[row.id], row.id in signed) for row in listed],
        more=more,
    )


@router.post(_PAGE + "/{webhook_id}/replay")
def replay_delivery(
    namespace: str, webhook_id: str, resources: ResourcesOf, actor: PageAdmin, form: FormOf
) -> Response:
    """Sends one delivery again, or all dead ones if the form names none."""
    name, given = parse_name(namespace, "namespace"), form.get("delivery", "").strip()
    if given and (not given.isdecimal() or len(given) > MAX_DIGITS):
        raise Usage("bad_replay", f"{given[:20]!r} is not the number of a delivery.", subject=given[:20])
    with resources.write() as session:
        deliveries.replay(session, actor, webhook_id, int(given) if given else None)
    return redirect(f"/{name}/-/webhooks")
