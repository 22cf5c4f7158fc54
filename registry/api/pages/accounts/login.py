"""Sign in with a token, and sign out. The token is posted, so that no address and no log contains it."""

from typing import Annotated, cast
from urllib.parse import urlsplit

from fastapi import APIRouter, Query, Request, Response

from registry.api.http.loopback import Secret
from registry.api.http.request import ResourcesOf
from registry.api.http.rules import CallersOf
from registry.api.pages.html.forms import MAX_NEXT, FormOf, drop_session, is_private, keep_session, own_path
from registry.api.pages.html.render import page, redirect
from registry.api.pages.html.wire import PageCaller, PageRoute
from registry.domain.access import sessions
from registry.domain.access.audit import Actor
from registry.errors import Refused, Unauthenticated
from registry.transfer.sign_in import SignedIn, SignIn

router = APIRouter(route_class=PageRoute)

Next = Annotated[str, Query(max_length=MAX_NEXT)]


Code = Annotated[str, Query(max_length=64, description="The code of the link that `adaptory serve` printed.")]


@router.get("/login")
def show_login(request: Request, actor: PageCaller, next: Next = "/", code: Code = "") -> Response:  # noqa: A002
    """The form for a token, or the reason why this server has none. The link of a single-user server signs its browser
    in."""
    secret = secret_of(request)
    if secret is None or not code:
        return login_page(request, 200, next)
    if not secret.use_link(request, code):
        return login_page(request, 401, next, error="This link has been used, or the server was started again since.")
    response = redirect(own_path(next))
    secret.remember(request, response)
    return response


@router.post("/login")
def log_in(request: Request, actor: PageCaller, form: FormOf, callers: CallersOf) -> Response:
    """Begin a session, and return to the page that led here."""
    following = own_path(form.get("next", "/"))
    if secret := secret_of(request):
        if not secret.is_own(form.get("token", "").strip()):
            return login_page(request, 401, following, error="This is not the secret of the server.")
        response = redirect(following)
        secret.remember(request, response)
        return response
    refuse_to_sign_in(request, single_user=callers.single_user)
    try:
        signed_in = sign_in_of(request).with_token(form.get("token", "").strip(), actor)
    except Unauthenticated as error:
        if "text/html" not in request.headers.get("accept", ""):
            raise
        return login_page(request, error.status, following, error=error.detail)
    return begun(signed_in, actor, following)


@router.post("/logout")
def log_out(resources: ResourcesOf, actor: PageCaller, callers: CallersOf, form: FormOf) -> Response:
    """End the session."""
    with resources.write() as session:
        sessions.end(session, actor)
    callers.forget()
    response = redirect("/login")
    drop_session(response)
    return response


def sign_in_of(request: Request) -> SignIn:
    return cast(SignIn, request.app.state.sign_in)


def secret_of(request: Request) -> Secret | None:
    """The sign-in page of a single-user server."""
    return cast("Secret | None", request.app.state.secret)


def refuse_to_sign_in(request: Request, *, single_user: bool) -> None:
    """Raises Refused if sessions cannot begin on this server."""
    if single_user:
        message = "This server has one user, who needs no session."
        raise Refused("sign_in_disabled", message, next_step="Set ADAPTORY_ACCESS=tokens on the server.")
    if not is_private(request):
        raise Refused(
            "sign_in_insecure",
            "This page was not loaded over https, so you cannot sign in here.",
            next_step="Use the https address of this registry. Behind a proxy, an operator must name it in "
            "ADAPTORY_TRUSTED_PROXIES, and it must set X-Forwarded-Proto.",
        )


def begun(signed_in: SignedIn, actor: Actor, following: str) -> Response:
    """Redirects to a path of this server, and sets the cookie of the new session."""
    response = redirect(following)
    keep_session(response, signed_in.secret, signed_in.expires_at, actor.at)
    return response


def login_page(request: Request, status: int, following: str, *, error: str | None = None) -> Response:
    """The form, with the error of the last attempt."""
    private, provider = is_private(request), sign_in_of(request).provider
    host = urlsplit(provider.settings.issuer).netloc if provider else None
    values = {
        "provider": host,
        "following": own_path(following),
        "private": private,
        "error": error,
    }
    return page(request, "login.html", status=status, by_https=request.url.scheme == "https", **values)
