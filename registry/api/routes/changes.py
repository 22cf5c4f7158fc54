"""Changes of a namespace that a second admin approves, and the inbox, which has them and waiting promotions."""

from fastapi import APIRouter

from registry.api.http.callers import ActorCache
from registry.api.http.pagination import Cursor, Limit, decode_number, page
from registry.api.http.request import ResourcesOf, RowId
from registry.api.http.routes import Route
from registry.api.http.rules import Admin, CallersOf, Member
from registry.database.tables import ChangeRequest
from registry.domain.access import namespaces
from registry.domain.access.audit import Actor
from registry.domain.changes import inbox, kinds, requests
from registry.transfer.resources import Resources
from registry.wire.changes import ChangeIn, ChangeOut, InboxOut, TakedownChange
from registry.wire.document import Page

router = APIRouter(prefix="/v1", tags=["access"], route_class=Route)

CHANGES = "/namespaces/{namespace}/changes"


@router.post(CHANGES, status_code=201)
def request_change(namespace: str, body: ChangeIn, resources: ResourcesOf, actor: Admin) -> ChangeOut:
    """Request a change that needs a second admin. It waits for 72 hours, and applies when another admin approves it."""
    with resources.write() as session:
        return _view(requests.request(session, actor, namespace, body.change), actor)


@router.get(CHANGES)
def list_changes(
    namespace: str, resources: ResourcesOf, actor: Admin, limit: Limit = 50, cursor: Cursor = None
) -> Page[ChangeOut]:
    """List the changes that wait or have waited, newest first."""
    with resources.read() as session:
        namespaces.find(session, namespace)
        rows = requests.list_page(session, namespace, before=decode_number(cursor), limit=limit + 1)
        return page([_view(row, actor) for row in rows], limit, [row.id for row in rows])


@router.get(CHANGES + "/{change_id}")
def show_change(namespace: str, change_id: RowId, resources: ResourcesOf, actor: Admin) -> ChangeOut:
    with resources.read() as session:
        return _view(requests.find(session, namespace, change_id), actor)


@router.post(CHANGES + "/{change_id}/approve")
def approve_change(
    namespace: str, change_id: RowId, resources: ResourcesOf, actor: Admin, callers: CallersOf
) -> ChangeOut:
    """Make a change that another admin requested. The answer's `state` says whether it was made: `refused` if it no
    longer may be, `conflict` if what it replaces has changed since."""
    return approved(resources, callers, actor, namespace, change_id)


@router.post(CHANGES + "/{change_id}/cancel")
def cancel_change(namespace: str, change_id: RowId, resources: ResourcesOf, actor: Admin) -> ChangeOut:
    """Withdraw a change that waits; any admin of the namespace may."""
    with resources.write() as session:
        return _view(requests.cancel(session, actor, requests.find(session, namespace, change_id)), actor)


@router.get("/inbox")
def show_inbox(resources: ResourcesOf, actor: Member, limit: Limit = 50) -> InboxOut:
    """Show what waits for a person: promotions where the caller is a member, and changes that need a second admin
    where the caller is an admin."""
    with resources.read() as session:
        items, more = inbox.waiting(session, actor, limit)
    return InboxOut(items=list(items), more=more)


def approved(resources: Resources, callers: ActorCache, actor: Actor, namespace: str, change_id: int) -> ChangeOut:
    """Makes a change that another admin requested. Raises as `requests.approve` does."""
    with resources.write() as session:
        row = requests.approve(session, actor, requests.find(session, namespace, change_id))
        view, change = _view(row, actor), requests.change_of(row)
    callers.forget()
    if isinstance(change, TakedownChange) and view.state == "applied":
        from registry.transfer.collect import remove_marked  # which loads more than all other routes here need

        remove_marked(resources)
    return view


def _view(row: ChangeRequest, actor: Actor) -> ChangeOut:
    change = requests.change_of(row)
    state = requests.state_of(row, actor.at)
    return ChangeOut.of(row, summary=kinds.summary(row.namespace, change), state=state)
