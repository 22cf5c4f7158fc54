"""RFC 9457: every error leaves as `application/problem+json` with a stable type."""

import logging
from typing import cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from composer.errors import ComposerError
from registry.errors import Invalid, RegistryError, Unavailable, Usage, of_composer
from registry.schemas import Problem

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"


def problem_response(error: RegistryError) -> JSONResponse:
    problem = Problem(
        type=f"urn:adaptory:problem:{error.code}",
        title=error.title,
        status=error.status,
        detail=error.detail,
        code=error.code,
        subject=error.subject,
        next=error.next_step,
        findings=error.findings,
    )
    headers = {"Retry-After": "5"} if error.status == 503 else None
    return JSONResponse(problem.model_dump(), status_code=error.status, media_type=MEDIA_TYPE, headers=headers)


def install(app: FastAPI) -> None:
    app.add_exception_handler(RegistryError, _registry_error)
    app.add_exception_handler(ComposerError, _composer_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _defect)


def _registry_error(_request: Request, error: Exception) -> JSONResponse:
    return problem_response(cast(RegistryError, error))


def _composer_error(_request: Request, error: Exception) -> JSONResponse:
    return problem_response(of_composer(cast(ComposerError, error)))


def _validation_error(_request: Request, error: Exception) -> JSONResponse:
    first = cast(RequestValidationError, error).errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return problem_response(
        Invalid(
            "bad_request",
            f"{where}: {first['msg']}.",
            subject=where,
            next_step="See /docs for the fields of this request.",
        )
    )


def _http_error(_request: Request, error: Exception) -> JSONResponse:
    """What the router itself refuses: an unknown path, a method that the path does not have."""
    raised = cast(HTTPException, error)
    told = Usage(f"http_{raised.status_code}", f"{raised.detail}.")
    response = problem_response(told)
    response.status_code = raised.status_code
    return response


def _defect(request: Request, error: Exception) -> JSONResponse:
    """What nobody foresaw: logged whole for the operator, told without its inside to the client."""
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    told = Unavailable("internal_error", f"The registry failed ({type(error).__name__}).", next_step="Look at its log.")
    response = problem_response(told)
    response.status_code = 500
    return response
