"""Changes to the members of a namespace, whose page lists them for its admins."""

from fastapi import APIRouter, Response

from registry.api.http.request import ResourcesOf
from registry.api.http.rules import CallersOf
from registry.api.pages.accounts.account import validated
from registry.api.pages.html.forms import FormOf
from registry.api.pages.html.render import redirect
from registry.api.pages.html.wire import PageAdmin, PageRoute
from registry.api.schemas.access import MemberIn
from registry.domain.access import namespaces
from registry.domain.access.roles import Role
from registry.formats.references import parse_name

router = APIRouter(route_class=PageRoute)


@router.post("/{namespace}/-/members")
def set_member(namespace: str, resources: ResourcesOf, actor: PageAdmin, callers: CallersOf, form: FormOf) -> Response:
    """Add a member, change its role, or remove it: an empty role. No repository is called `-`."""
    name = parse_name(namespace, "namespace")
    body: MemberIn = validated(MemberIn, {"user": form.get("user", "").strip(), "role": form.get("role") or None})
    with resources.write() as session:
        namespaces.find(session, name)  # only REST and the command line create one
        namespaces.set_member(session, actor, name, body.user, Role(body.role) if body.role else None)
    callers.forget()
    return redirect(f"/{name}#members")
