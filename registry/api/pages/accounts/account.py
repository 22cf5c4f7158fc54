"""Who somebody is here: roles, tokens and sessions. A new token is shown once, in the answer to its form."""

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from registry.api.http.request import ResourcesOf
from registry.api.http.rules import CallersOf
from registry.api.pages.html.forms import Form, FormOf
from registry.api.pages.html.render import page, redirect
from registry.api.pages.html.wire import PageCaller, PageRoute
from registry.api.schemas.access import TokenIn
from registry.domain.access import tokens
from registry.domain.access.roles import EVERYWHERE, Role, holds, refuse_anonymous
from registry.domain.access.tokens import NewToken

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
    scope = {namespace: Role(role) for namespace, role in body.scope.items()}
    with resources.write() as session:
        lifetime = tokens.lifetime_of(session, actor, body.expires_in_days, resources.settings)
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
    """The form as REST's document. Fields that are left empty have its defaults."""
    document: dict[str, Any] = {name: form[name].strip() for name in ("user", "name") if form.get(name, "").strip()}
    if days := form.get("expires_in_days", "").strip():
        document["expires_in_days"] = days
    document["scope"] = {form.get("namespace", "").strip() or EVERYWHERE: form.get("role") or Role.ADMIN.value}
    return validated(TokenIn, document)


def validated(model: type[Any], document: dict[str, Any]) -> Any:
    """A document of REST from the fields of a form, with REST's own errors."""
    try:
        return model.model_validate(document)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error
