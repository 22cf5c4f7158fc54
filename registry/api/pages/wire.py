"""Routes of pages: who may see them, and errors as pages."""

from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Annotated, Any

from fastapi import Depends, Request, Response
from fastapi.exceptions import RequestValidationError

from registry.api.http.callers import Credentials
from registry.api.http.problems import of_validation
from registry.api.http.routes import Route
from registry.api.http.rules import Rule, Where
from registry.api.pages.render import page
from registry.domain.access.audit import Actor
from registry.domain.access.roles import Role
from registry.errors import RegistryError

COOKIE = "__Host-adaptory"
"""Browsers send it only by https, to this host alone, and no script reads it."""


@dataclass(frozen=True, slots=True)
class PageRule(Rule):
    """A rule for a page: the cookie alone says who the caller is. Tokens are for REST."""

    def credentials(self, request: Request) -> Credentials:
        session = request.cookies.get(COOKIE, "")
        return replace(Rule.credentials(self, request), authorization=f"Bearer {session}" if session else "")


PageReader = Annotated[Actor, Depends(PageRule(Where.NAMESPACE, Role.READER))]
PageCaller = Annotated[Actor, Depends(PageRule(Where.INSIDE))]


class PageRoute(Route):
    """Shows errors as pages, to those who ask for pages."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "include_in_schema": False})

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        answer = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await answer(request)
            except (RegistryError, RequestValidationError) as error:
                if "text/html" not in request.headers.get("accept", ""):
                    raise  # a program gets the problem document
                return error_page(request, error if isinstance(error, RegistryError) else of_validation(error))

        return handle


def error_page(request: Request, error: RegistryError) -> Response:
    """What is wrong and what to do. What a caller may not see does not exist, so it says 404 too."""
    return page(request, "error.html", status=error.status, error=error)
