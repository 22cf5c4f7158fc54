"""The cookie of a session, and the check that forms come from this server's own pages and from the session that loaded
them.

`PageRoute` checks every request that changes something. Templates put `parts.csrf()` into each form that is posted.
"""

import hashlib
import hmac
import multiprocessing
import re
from datetime import datetime
from typing import Annotated, cast
from urllib.parse import parse_qsl

from fastapi import Depends, Request, Response
from starlette.datastructures import ImmutableMultiDict

from registry.api.http.request import document, refuse_longer
from registry.api.http.rules import callers_of
from registry.environment.network import is_loopback
from registry.errors import Invalid, NotAllowed

COOKIE = "__Host-adaptory"
"""Browsers send it only over https and to this host alone, and no script can read it."""
FORM_TOKEN = "form_token"  # noqa: S105  (the name of a field)
MAX_FORM_BYTES = 64 << 10
MAX_FIELDS = 400
"""A recipe of 64 inputs has three fields for each."""
MAX_NEXT = 2000

_OWN_PATH = re.compile(r"/(?![/\\])[\x21-\x5b\x5d-\x7e]*")
"""ASCII without spaces and backslashes: browsers read `/\\host` and `//host` as other servers."""

Form = ImmutableMultiDict[str, str]


def session_of(request: Request) -> str:
    """The secret in the cookie; empty without a session."""
    return request.cookies.get(COOKIE, "")


def keep_session(response: Response, secret: str, expires_at: datetime | None, now: datetime) -> None:
    """Sets the cookie of a session in the browser, for as long as the session lasts."""
    lasts_s = int((expires_at - now).total_seconds()) if expires_at is not None else None
    set_cookie(response, COOKIE, secret, lasts_s)


def drop_session(response: Response) -> None:
    set_cookie(response, COOKIE, "", 0)


def set_cookie(response: Response, name: str, value: str, lasts_s: int | None) -> None:
    """Sets a cookie for this host alone, sent over https, that no script can read."""
    response.set_cookie(name, value, max_age=lasts_s, path="/", secure=True, httponly=True, samesite="lax")


def number_shown(form: Form, field: str) -> int:
    """The number of the move or revision that the form's page showed; 0 if there was none. Raises Invalid if the field
    does not contain a number."""
    text = form.get(field, "")
    if not text.isascii() or not text.isdecimal() or len(text) > 18:
        raise Invalid("bad_request", "The form does not state what its page showed.", next_step="Load the page again.")
    return int(text)


def is_private(request: Request) -> bool:
    """Whether browsers keep the cookie and nobody on the way can read its secret: over https, or within this machine.
    `ADAPTORY_TRUSTED_PROXIES` names the proxies whose statement about the scheme counts."""
    return request.url.scheme == "https" or is_loopback(request.url.hostname or "")


def form_token(request: Request) -> str:
    """The token that a posted form must contain. It is bound to the session's secret, or, on a single-user server, to
    one of its processes. Without a session there is nothing to protect, and the token is empty."""
    if callers_of(request).single_user:
        secret = bytes(multiprocessing.current_process().authkey)  # random, and the same in processes started by one
    else:
        secret = session_of(request).encode()
    return hmac.new(secret, b"form of a page", hashlib.sha256).hexdigest() if secret else ""


async def read_form(request: Request) -> Form:
    """Reads the fields of a form from one of this server's own pages. Raises NotAllowed for a form of another site or
    session."""
    refuse_longer(request, "form", MAX_FORM_BYTES, "Send less; the command line has no such limit.")
    form = _parsed(request, await document(request))
    if not hmac.compare_digest(form.get(FORM_TOKEN, "").encode(), form_token(request).encode()):
        raise NotAllowed("form_token", "The form belongs to another session.")
    return form


def refuse_other_site(request: Request) -> None:
    """Raises NotAllowed unless a page of this server sent the request, which every browser states in one of two
    headers."""
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    own = f"{request.url.scheme}://{request.headers.get('host', '')}"
    if site in (None, "same-origin") and origin in (None, own) and (site or origin):
        return
    raise NotAllowed(
        "other_site",
        f"The form was not sent by a page of {own[:200]}.",
        subject=(origin or "")[:200],
        next_step="Use a page of this registry. Behind a proxy, an operator must set ADAPTORY_TRUSTED_PROXIES, and "
        "the proxy must pass on Host and X-Forwarded-Proto.",
    )


def own_path(text: str) -> str:
    """The path to return to after signing in, if it is one of this server; else the first page."""
    return text if len(text) <= MAX_NEXT and _OWN_PATH.fullmatch(text) else "/"


def _parsed(request: Request, content: bytes) -> Form:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip()
    try:
        if media_type != "application/x-www-form-urlencoded":
            raise ValueError("its type is not application/x-www-form-urlencoded")
        fields = parse_qsl(content.decode(), keep_blank_values=True, max_num_fields=MAX_FIELDS, errors="strict")
        if any("\0" in part for field in fields for part in field):
            raise ValueError("it contains a NUL character")
    except ValueError as error:
        reason = str(error) if not isinstance(error, UnicodeError) else "it is not UTF-8"
        raise Invalid("bad_request", f"The form cannot be read: {reason}.", next_step="Use the page.") from error
    return ImmutableMultiDict(fields)


async def _form_of(request: Request) -> Form:
    return cast(Form, request.state.form)


FormOf = Annotated[Form, Depends(_form_of)]
"""The fields of the request, which `PageRoute` has checked and read."""
