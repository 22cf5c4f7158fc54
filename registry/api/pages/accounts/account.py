"""The account page: roles, tokens and sessions. A new token is shown once, in the answer to its form."""

from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import APIRouter, Depends, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, TypeAdapter, ValidationError

from registry.api.http.pagination import Cursor, decode_number, first_rows
from registry.api.http.request import ResourcesOf
from registry.api.http.rules import CallersOf, Where
from registry.api.pages.html.forms import Form, FormOf
from registry.api.pages.html.render import page, redirect
from registry.api.pages.html.wire import PageCaller, PageRoute, PageRule, parses
from registry.api.routes.queries import EventFilters
from registry.api.routes.views import audit_view
from registry.domain.access import audit, tokens
from registry.domain.access.audit import Act, Actor
from registry.domain.access.roles import EVERYWHERE, Role, holds, refuse_anonymous
from registry.domain.access.tokens import NewToken
from registry.wire.access import TokenIn

router = APIRouter(route_class=PageRoute)

SHOWN = 100


@router.get("/account")
def show_account(request: Request, resources: ResourcesOf, actor: PageCaller) -> Response:
    refuse_anonymous(actor)
    with resources.read() as session:
        rows = tokens.list_own_in_force(session, actor, limit=SHOWN)
    return page(
        request,
        "account.html",
        user=actor.name,
        grants=sorted(actor.grants.items()),
        limited=actor.hidden,
        rows=rows,
        own_id=actor.token_id,
        mints=actor.mints,
        operator=holds(actor, Role.ADMIN),
        roles=[role.value for role in Role],
    )


@router.post("/account/tokens")
def create_token(request: Request, resources: ResourcesOf, actor: PageCaller, form: FormOf) -> Response:
    """Create a token. Only this answer has its secret."""
    refuse_anonymous(actor)
    body = _token_in(form)
    settings, scope = resources.settings, {namespace: Role(role) for namespace, role in body.scope.items()}
    with resources.write() as session:
        limits = {"default_days": settings.token_days, "max_days": settings.max_token_days}
        lifetime = tokens.lifetime_of(session, actor, body.expires_in_days, **limits)
        row, secret = tokens.create(session, actor, NewToken(body.user or actor.name, body.name, scope, lifetime))
    return page(request, "token.html", status=201, row=row, secret=secret)


@router.post("/account/tokens/{token_id}/revoke")
def revoke_token(
    token_id: str, resources: ResourcesOf, actor: PageCaller, callers: CallersOf, form: FormOf
) -> Response:
    refuse_anonymous(actor)
    with resources.write() as session:
        tokens.revoke(session, actor, token_id)
    callers.forget()
    return redirect("/account")


def _token_in(form: Form) -> TokenIn:
    """The document that REST expects, from the fields of the form. Fields that are left empty get its defaults."""
    document: dict[str, Any] = {name: form[name].strip() for name in ("user", "name") if form.get(name, "").strip()}
    if days := form.get("expires_in_days", "").strip():
        document["expires_in_days"] = days
    document["scope"] = {form.get("namespace", "").strip() or EVERYWHERE: form.get("role") or Role.ADMIN.value}
    return validated(TokenIn, document)


def validated(model: type[BaseModel] | TypeAdapter[Any], document: dict[str, Any]) -> Any:
    """A document of REST, validated from the fields of a form; raises the errors that REST raises."""
    try:
        return (model if isinstance(model, TypeAdapter) else TypeAdapter(model)).validate_python(document)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error


ENTRIES = 50
PageAdminSomewhere = Annotated[Actor, Depends(PageRule(Where.ANYWHERE, Role.ADMIN))]


@router.get("/audit", openapi_extra=parses(*EventFilters.model_fields))
def show_audit(request: Request, resources: ResourcesOf, actor: PageAdminSomewhere, cursor: Cursor = None) -> Response:
    """The rows that REST lists to this admin, newest first. Empty fields of the form are ignored."""
    given = {name: value for name, value in request.query_params.items() if value and name in EventFilters.model_fields}
    filters: EventFilters = validated(EventFilters, given)
    with resources.read() as session:
        before = decode_number(cursor)
        rows = audit.list_newest_first(session, filters.query(actor), before=before, limit=ENTRIES + 1)
        listed, following = first_rows(rows, ENTRIES, lambda row: row.id)
        views = [audit_view(row) for row in listed]
    more = urlencode({**given, "cursor": following}) if following else None
    address = "/v1/audit" + (f"?{urlencode(given)}" if given else "")
    return page(request, "audit.html", events=views, asked=given, acts=list(Act), more=more, json_address=address)
