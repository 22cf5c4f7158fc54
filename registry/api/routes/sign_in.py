"""What the OpenID provider tells the registry itself, without a browser."""

from typing import Annotated, cast
from urllib.parse import parse_qsl

from fastapi import APIRouter, Depends, Request, Response

from registry.api.http.callers import credentials_of
from registry.api.http.request import document, refuse_longer
from registry.api.http.routes import Route
from registry.api.http.rules import MAX_STRANGERS_BYTES, CallersOf
from registry.api.http.threads import in_sign_in_threads
from registry.errors import Unauthenticated, Usage
from registry.transfer.sign_in import SignIn

router = APIRouter(prefix="/v1", tags=["access"], route_class=Route)


async def _logout_token(request: Request) -> str:
    """The token in the request's form."""
    refuse_longer(request, "body", MAX_STRANGERS_BYTES, "Send only the logout token.")
    content = await document(request)
    try:
        return dict(parse_qsl(content.decode(), max_num_fields=20)).get("logout_token", "")
    except ValueError as error:
        raise Usage("logout_refused", "The body must be a form with a logout_token.") from error


@router.post("/sign-in/logout")
@in_sign_in_threads
def log_out_at_provider(request: Request, text: Annotated[str, Depends(_logout_token)], callers: CallersOf) -> Response:
    """End the sessions of a user who has signed out at the OpenID provider, or was removed there (OpenID Connect
    Back-Channel Logout 1.0). The form has the provider's `logout_token`; 400 for one that is not valid here."""
    client = cast("tuple[str, int] | None", request.scope.get("client"))
    source = credentials_of(dict(request.scope["headers"]), client).source
    try:
        cast(SignIn, request.app.state.sign_in).logged_out(text, source)
    except Unauthenticated as error:
        raise Usage("logout_refused", error.detail) from error
    callers.forget()
    return Response(headers={"Cache-Control": "no-store"})
