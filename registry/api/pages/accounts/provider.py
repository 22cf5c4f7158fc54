"""Sign in with an OpenID provider: the redirect to it, and its answer."""

from collections.abc import Callable, Coroutine
from typing import Any, cast
from urllib.parse import quote, unquote

from fastapi import APIRouter, Request, Response
from starlette.datastructures import QueryParams

from registry.api.http.rules import CallersOf
from registry.api.http.threads import in_sign_in_threads
from registry.api.pages.accounts.login import Next, begun, login_page, refuse_to_sign_in, sign_in_of
from registry.api.pages.html.forms import own_path, set_cookie
from registry.api.pages.html.render import redirect
from registry.api.pages.html.wire import PageCaller, PageRoute
from registry.errors import NotAllowed, Refused, Unauthenticated
from registry.transfer.openid import Attempt, OpenIdProvider
from registry.transfer.sign_in import SignedIn

ATTEMPT_COOKIE = "__Host-adaptory-sign-in"
ATTEMPT_S = 600
CALLBACK_PATH = "/login/callback"


class CallbackRoute(PageRoute):
    """Removes the query from the address, so that no page and no error shows it. Providers may send unknown parameters
    (RFC 6749, 4.1.2)."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        answer = super().get_route_handler()

        async def handle(request: Request) -> Response:
            fields = QueryParams(cast(bytes, request.scope["query_string"]))
            request.scope["query_string"] = b""
            request.state.answer = dict(fields)
            return await answer(request)

        return handle


router = APIRouter(route_class=PageRoute)
callback = APIRouter(route_class=CallbackRoute)


@router.get("/login/provider")
@in_sign_in_threads
def go_to_provider(request: Request, actor: PageCaller, callers: CallersOf, next: Next = "/") -> Response:  # noqa: A002
    """Begin an attempt. The browser keeps its secret and the page to return to for ten minutes."""
    provider, attempt = _provider(request, single_user=callers.single_user), Attempt.new()
    response = redirect(provider.address(attempt, _redirect_uri(request)))
    set_cookie(response, ATTEMPT_COOKIE, f"{attempt.secret}.{quote(own_path(next), safe='')}", ATTEMPT_S)
    return response


@callback.get(CALLBACK_PATH)
@in_sign_in_threads
def come_back(request: Request, actor: PageCaller, callers: CallersOf) -> Response:
    """End the attempt, and begin a session if the provider vouches for the user."""
    _provider(request, single_user=callers.single_user)
    secret, _, kept = request.cookies.get(ATTEMPT_COOKIE, "").partition(".")
    following = own_path(unquote(kept))
    attempt = Attempt(secret) if secret else Attempt.new()  # which no answer belongs to
    try:
        signed_in: SignedIn = sign_in_of(request).with_provider(
            attempt, request.state.answer, _redirect_uri(request), actor
        )
        response = begun(signed_in, actor, following)
    except (NotAllowed, Unauthenticated) as error:
        if "text/html" not in request.headers.get("accept", ""):
            raise
        response = login_page(request, error.status, following, error=f"{error.detail} {error.next_step}")
    set_cookie(response, ATTEMPT_COOKIE, "", 0)
    return response


router.routes.extend(callback.routes)


def _provider(request: Request, *, single_user: bool) -> OpenIdProvider:
    refuse_to_sign_in(request, single_user=single_user)
    provider = sign_in_of(request).provider
    if provider is None:
        raise Refused(
            "sign_in_disabled",
            "This server has no OpenID provider.",
            next_step="Sign in with a token, or ask an operator to set ADAPTORY_SIGN_IN__ISSUER.",
        )
    return provider


def _redirect_uri(request: Request) -> str:
    """The address to which the provider returns the browser; it accepts only registered ones."""
    return f"{request.url.scheme}://{request.url.netloc}{CALLBACK_PATH}"
