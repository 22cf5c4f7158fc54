"""RFC 9457: every error is returned as `application/problem+json` with a stable type."""

import logging
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, cast

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Scope

from composer.errors import ComposerError
from registry.api.http.exchanges import request_id
from registry.domain.access.audit import Actor
from registry.domain.catalog import repositories
from registry.errors import FAMILIES, Invalid, RegistryError, Unauthenticated, Unavailable, Usage
from registry.errors.outages import OutageLog
from registry.errors.translation import of_composer
from registry.formats.references import nearest
from registry.transfer.resources import Resources
from registry.wire.document import Problem

log = logging.getLogger(__name__)
outages = OutageLog(log)

MEDIA_TYPE = "application/problem+json"
API_PATH = "/v1/"
ErrorPage = Callable[[Request, RegistryError, int], Response]
"""A page with this status. The application's state has it if there are pages."""
MAX_TEXT = 1_000
"""Maximum characters of an error's text in a header."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_OF_NAMES = frozenset({"repository_unknown", "namespace_unknown"})
_CHOICES = frozenset({"literal_error", "enum"})
"""Pydantic's errors for a word that is not in a list of choices."""
_NO_OBJECT = frozenset({"missing", "model_attributes_type", "model_type", "dict_type"})
"""Its errors for a body that is absent, or was not sent as a JSON object."""


def problem_response(
    error: RegistryError, status: int | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """Returns an error as a problem document. The status, of the response and in its body, is that of the error's
    family unless HTTP has a more specific one.
    """
    status = status or error.status
    problem = Problem(
        type=f"urn:adaptory:problem:{error.code}",
        title=error.title,
        family=error.family,
        status=status,
        detail=error.detail,
        code=error.code,
        subject=error.subject,
        next=error.next_step,
        help=f"/docs/errors/{error.code}",
        findings=error.findings,
        request_id=request_id(),
    )
    more = {"X-Error-Message": header_text(str(error)), **(headers or {})}  # printed by clients of the Hugging Face Hub
    if error.retry_after_s is not None and status == error.status:
        more["Retry-After"] = str(error.retry_after_s)
    if isinstance(error, Unauthenticated):
        more["WWW-Authenticate"] = "Bearer"
    return JSONResponse(problem.model_dump(), status_code=status, media_type=MEDIA_TYPE, headers=more)


def error_response(
    scope: Scope, error: RegistryError, status: int | None = None, headers: Mapping[str, str] | None = None
) -> Response:
    """Renders a page for a browser if the server has pages and the path is not below /v1, else `problem_response`."""
    shown = cast("ErrorPage | None", getattr(scope["app"].state, "error_page", None))
    accepted = b",".join(value for name, value in scope["headers"] if name == b"accept")
    problem = problem_response(error, status, headers)
    if shown is None or b"text/html" not in accepted or scope["path"].startswith(API_PATH):
        return problem
    page = shown(Request(scope), error, problem.status_code)
    for name in ("Retry-After", *(headers or {})):
        if name in problem.headers:
            page.headers[name] = problem.headers[name]
    return page


def header_text(text: str) -> str:
    """A text as the value of a header: one line, with `?` for characters that a header cannot have."""
    line = " ".join(text.split())[:MAX_TEXT].encode("latin-1", "replace").decode("latin-1")
    return _CONTROL.sub("?", line)


def install(app: FastAPI) -> None:
    """Makes every error of the application a problem document, also in its OpenAPI document."""
    app.add_exception_handler(RegistryError, _registry_error)
    app.add_exception_handler(ComposerError, _translated_error)
    app.add_exception_handler(RequestValidationError, _translated_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(OSError, _disk_error)
    app.add_exception_handler(UnicodeEncodeError, _unicode_error)
    app.add_exception_handler(Exception, _defect)
    _describe(app)


def _describe(app: FastAPI) -> None:
    """In the OpenAPI document, every operation may return a problem, which replaces the framework's own 422 form."""
    of_framework = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = of_framework()
            components: dict[str, Any] = document["components"]
            for name in ("HTTPValidationError", "ValidationError"):
                components["schemas"].pop(name, None)
            components["schemas"]["Problem"] = Problem.model_json_schema()
            content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
            components["responses"] = {"Problem": {"description": "The error, and the next step.", "content": content}}
            components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
            for operations in document["paths"].values():
                for operation in operations.values():
                    _describe_problems(operation, content)
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi


def _describe_problems(operation: dict[str, Any], content: dict[str, Any]) -> None:
    """Describes the statuses that the route declares, and a default for all others."""
    responses: dict[str, Any] = operation["responses"]
    for status, response in responses.items():
        if status.isdecimal() and int(status) >= 400:
            response["content"] = content
    responses["default"] = {"$ref": "#/components/responses/Problem"}


async def _registry_error(request: Request, error: Exception) -> Response:
    failure = cast(RegistryError, error)
    if failure.code in _OF_NAMES and (actor := getattr(request.state, "actor", None)) is not None:
        with suppress(RegistryError):  # only a hint: the error is returned without it
            await run_in_threadpool(_name_near_ones, request, failure, actor)
    return error_response(request.scope, failure)


def _name_near_ones(request: Request, error: RegistryError, actor: Actor) -> None:
    """Suggests near names among those that this caller may read, whether or not the object exists: the response reveals
    nothing."""
    asked = error.subject
    if "/" not in asked:
        name = request.path_params.get("name")
        asked = f"{asked}/{name}" if name else re.split("[:@#]", request.query_params.get("ref", asked))[0]
    resources = cast(Resources, request.app.state.resources)
    with resources.read() as session:
        known = repositories.beside(session, actor, asked)
    if "/" not in asked:
        known = sorted({named.partition("/")[0] for named in known})
    error.next_step = nearest(asked, known, error.next_step)


def _translated_error(_request: Request, error: Exception) -> JSONResponse:
    return problem_response(as_registry_error(error))


def as_registry_error(error: Exception) -> RegistryError:
    """An error of the registry, the composer or a request's validation, as REST reports it."""
    if isinstance(error, RequestValidationError):
        return _of_validation(error)
    return of_composer(error) if isinstance(error, ComposerError) else cast(RegistryError, error)


def _of_validation(error: RequestValidationError) -> Invalid:
    """The first thing that is wrong with a request."""
    first = error.errors()[0]
    if first["type"] == "json_invalid" or (first["type"] in _NO_OBJECT and first["loc"] == ("body",)):
        reason = f": {first['ctx']['error']}" if first["type"] == "json_invalid" else ""
        return Invalid(
            "bad_request",
            f"The body must be a JSON object{reason}.",
            subject="body",
            next_step="Send one, with `Content-Type: application/json`; see /openapi.json for its fields.",
        )
    where = ".".join(str(part) for part in first["loc"])
    wrong, next_step = str(first["msg"]), "See /openapi.json for the fields of this request."
    if first["type"] in _CHOICES:
        wrong, next_step = f"{str(first['input'])[:100]!r} is unknown", f"Use {first['ctx']['expected']}."
    elif first["type"].startswith("datetime"):
        next_step = "Write a day or a moment, as in 2026-01-31 or 2026-01-31T12:00:00Z."
    return Invalid("bad_request", f"{where}: {wrong}.", subject=where, next_step=next_step)


def _http_error(request: Request, error: Exception) -> Response:
    """Errors of the router itself: an unknown path, or a method that the path does not have."""
    raised = cast(HTTPException, error)
    family = next((family for family in FAMILIES if family.status == raised.status_code), Usage)
    failure = family(
        f"http_{raised.status_code}",
        f"{request.method} {request.url.path[:200]}: {raised.detail}.",
        next_step="See /openapi.json for the paths of this registry and their methods.",
    )
    return error_response(request.scope, failure, raised.status_code, raised.headers)


def _disk_error(request: Request, error: Exception) -> Response:
    """A disk that is full, gone or read-only, in any route."""
    outages.warn(f"The disk cannot be used, as in {request.method} {request.url.path[:200]!r}", error)
    reason = cast(OSError, error).strerror or type(error).__name__
    failure = Unavailable("disk_error", f"The registry cannot use its disk: {reason}.")
    return error_response(request.scope, failure)


def _defect(request: Request, error: Exception) -> JSONResponse:
    """An unexpected error: logged in full for the operator, and without its details for the client."""
    if isinstance(error, ClientDisconnect):
        log.info("%s %r: the client hung up", request.method, request.url.path[:200])
    else:
        log.error("%s %r failed", request.method, request.url.path[:200], exc_info=error)
    failed = f"The registry failed ({type(error).__name__})."
    failure = Unavailable("internal_error", failed)
    return problem_response(failure, 500, {"X-Request-Id": request_id() or ""})  # skips the middleware that adds the id


def _unicode_error(_request: Request, _error: Exception) -> JSONResponse:
    """JSON can spell an unpaired surrogate, which no database or encoding accepts."""
    return problem_response(Invalid("bad_text", "The text contains an unpaired surrogate."))
