"""POST /oauth/token: the ID token of a job of continuous integration for a token of this registry (RFC 8693).

`huggingface_hub` from 2.0 on calls it where HF_OIDC_RESOURCE is set.
"""

from collections.abc import Mapping
from typing import Annotated, Any, cast
from urllib.parse import parse_qsl

import orjson
from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse

from registry.api.http.callers import credentials_of
from registry.api.http.request import document, refuse_longer
from registry.api.http.rules import MAX_STRANGERS_BYTES, callers_of
from registry.api.http.threads import in_exchange_threads
from registry.api.hub.wire import HubRoute, refusal
from registry.errors import NotAllowed, Refused, RegistryError, Usage
from registry.formats.references import parse_repository
from registry.transfer.token_exchange import TokenExchange

router = APIRouter(route_class=HubRoute)

GRANT = "urn:ietf:params:oauth:grant-type:token-exchange"
SUBJECT_TYPES = ("urn:ietf:params:oauth:token-type:id_token", "urn:ietf:params:oauth:token-type:jwt")
ISSUED_TYPE = "urn:ietf:params:oauth:token-type:access_token"
_NO_STORE = {"Cache-Control": "no-store", "Pragma": "no-cache"}


async def fields_of(request: Request) -> dict[str, str]:
    """The fields of the request: JSON, which the client sends, or the form that the standard requires."""
    refuse_longer(request, "body", MAX_STRANGERS_BYTES, "Send only the ID token and its resource.")
    content = await document(request)
    try:
        if request.headers.get("content-type", "").startswith("application/x-www-form-urlencoded"):
            return dict(parse_qsl(content.decode(), max_num_fields=20))
        given = orjson.loads(content)
    except ValueError as error:
        raise _bad("the body must be JSON or a form") from error
    table = cast("dict[str, object]", given) if isinstance(given, dict) else {}
    return {name: value for name, value in table.items() if isinstance(value, str)}


@router.post("/oauth/token")
@in_exchange_threads
def exchange_token(request: Request, fields: Annotated[dict[str, str], Depends(fields_of)]) -> JSONResponse:
    """Exchange an ID token for a token that publishes in one repository, for an hour."""
    try:
        return JSONResponse(_exchanged(request, fields), headers=_NO_STORE)
    except RegistryError as error:
        return _answer(request, error)


def _exchanged(request: Request, fields: Mapping[str, str]) -> dict[str, Any]:
    if callers_of(request).single_user:
        message = "This server has one user, who needs no token."
        raise Refused("exchange_disabled", message, next_step="Set ADAPTORY_ACCESS=tokens on the server.")
    if fields.get("grant_type") != GRANT:
        raise _bad(f"grant_type must be {GRANT}")
    if fields.get("subject_token_type") not in SUBJECT_TYPES:
        raise _bad(f"subject_token_type must be {SUBJECT_TYPES[0]}")
    if not (fields.get("subject_token") and fields.get("resource")):
        raise _bad("subject_token and resource are required")
    repository = parse_repository(fields["resource"])
    client = cast("tuple[str, int] | None", request.scope.get("client"))
    source = credentials_of(dict(request.scope["headers"]), client).source
    exchange = cast(TokenExchange, request.app.state.token_exchange)
    done = exchange.exchange(fields["subject_token"], repository, source)
    return {
        "access_token": done.token,
        "issued_token_type": ISSUED_TYPE,
        "token_type": "bearer",
        "expires_in": done.expires_in_s,
    }


def _answer(request: Request, error: RegistryError) -> JSONResponse:
    """The problem document, with the two fields that the standard has for errors."""
    response = refusal(request, error)
    problem = cast("dict[str, Any]", orjson.loads(bytes(response.body)))
    invalid = "invalid_grant" if isinstance(error, NotAllowed) else "invalid_request"
    known = "unsupported_grant_type" if "grant_type" in error.detail and error.code == "bad_grant" else invalid
    headers = {name: value for name, value in response.headers.items() if name != "content-length"}
    content = problem | {"error": known, "error_description": error.detail}
    return JSONResponse(content, status_code=response.status_code, headers=headers | _NO_STORE)


def _bad(why: str) -> Usage:
    return Usage(
        "bad_grant",
        f"No token is exchanged: {why}.",
        next_step="To use the client, set HF_TOKEN, or HF_OIDC_RESOURCE in continuous integration.",
    )
