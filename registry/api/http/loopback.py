"""The secret of a server for one user, on a loopback address that every user of the machine reaches."""

import hashlib
import hmac
import re
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from registry.api.http.guards import HEALTH_PATHS, SIGN_IN_PATH
from registry.api.http.problems import error_response, header_text
from registry.api.http.request import SAFE_METHODS
from registry.environment import home
from registry.errors import Unauthenticated

_OPEN = re.compile(rf"(?:{'|'.join(HEALTH_PATHS)}|{SIGN_IN_PATH})\Z|/static/|/xet/|/api/lfs/")
"""Instead of the token, Xet and LFS clients send the credentials that the server issued for one push."""
_PROGRAMS = re.compile(r"/v1/|/api/|/oauth/|/[^/]+/[^/]+\.git/")
"""Changes here need the secret itself: a page of another server on this machine could make a browser send a cookie."""
_BEGINS_UPLOAD = re.compile(r"/api/.*/xet-write-token/")
"""A GET that is a change."""


class Secret:
    """The secret of a server, and the cookie that a browser has instead."""

    def __init__(self, directory: Path, text: str) -> None:
        self._home, self._text = directory, text
        self._cookie = hmac.new(text.encode(), b"pages", hashlib.sha256).hexdigest()

    def is_own(self, text: str) -> bool:
        return hmac.compare_digest(text.encode(), self._text.encode())

    def use_link(self, request: Request, code: str) -> bool:
        """Checks the code of a sign-in link, which is valid once."""
        return home.use_link(self._home, *_server(request), code)

    def is_known(self, request: Request) -> bool:
        """Checks that the request has the secret or comes from a browser that has signed in."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self.is_own(token.strip()):
            return True
        cookie = request.cookies.get(_name(request), "")
        if not hmac.compare_digest(cookie.encode(), self._cookie.encode()):
            return False
        path = str(request.scope["path"])
        changes = request.method not in SAFE_METHODS or _BEGINS_UPLOAD.match(path)
        return not (changes and _PROGRAMS.match(path))

    def remember(self, request: Request, response: Response) -> None:
        """Sets a cookie that ends with the browser. It is not `Secure`, since loopback is served over http."""
        response.set_cookie(_name(request), self._cookie, path="/", httponly=True, samesite="lax")


class AskForSecret:
    """Answers 401 to requests without the secret, but for probes, signing in, and addresses made for one upload."""

    def __init__(self, app: ASGIApp, secret: Secret) -> None:
        self.app, self._secret = app, secret

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = self.app
        if scope["type"] == "http" and not _OPEN.match(scope["path"]):
            request = Request(scope)
            if not self._secret.is_known(request):
                answer = _refusal(request)
        await answer(scope, receive, send)


def _refusal(request: Request) -> Response:
    error = Unauthenticated(
        "secret_missing",
        "This server is for one user of its machine, and the request does not have its secret.",
        next_step="Open the link that `adaptory serve` printed. Programs send the content of "
        f"ADAPTORY_HOME/{home.secret_path(Path(), *_server(request))} as a token (ADAPTORY_TOKEN, HF_TOKEN).",
    )
    return error_response(
        request.scope, error, headers={"X-Error-Message": header_text(f"{error.detail} {error.next_step}")}
    )


def _name(request: Request) -> str:
    """The cookie's name, with the port: browsers share cookies between the ports of a host."""
    return f"adaptory-{_server(request)[1]}"


def _server(request: Request) -> tuple[str, int]:
    """The address and port that the server listens on."""
    host, port = request.scope.get("server") or ("127.0.0.1", 0)
    return host, int(port or 0)
