"""Routes of pages: their permissions, their forms, and errors as pages."""

from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Annotated, Any

from fastapi import Depends, Request, Response
from fastapi.exceptions import RequestValidationError

from composer.errors import ComposerError
from registry.api.http.callers import Credentials
from registry.api.http.problems import as_registry_error
from registry.api.http.request import SAFE_METHODS, ResourcesOf
from registry.api.http.routes import Route
from registry.api.http.rules import Rule, Where, rules_of
from registry.api.pages.html.forms import drop_session, read_form, refuse_other_site, session_of
from registry.api.pages.html.render import HEADERS, link, page
from registry.domain.access.audit import Actor
from registry.domain.access.roles import Role
from registry.errors import RegistryError
from registry.formats.references import RepositoryName, Version, parse_name, parse_repository, parse_version
from registry.transfer.resources import Resources


@dataclass(frozen=True, slots=True)
class PageRule(Rule):
    """The rule of a page. Only the cookie identifies the caller; tokens are for REST."""

    def credentials(self, request: Request) -> Credentials:
        return replace(Rule.credentials(self, request), authorization="", session=session_of(request))


ERRORS = (RegistryError, ComposerError, RequestValidationError)
"""Errors that a page may raise: shown as a page, or beside the form that caused them."""
PageReader = Annotated[Actor, Depends(PageRule(Where.NAMESPACE, Role.READER))]
PagePublisher = Annotated[Actor, Depends(PageRule(Where.NAMESPACE, Role.PUBLISHER))]
PageReleaser = Annotated[Actor, Depends(PageRule(Where.NAMESPACE, Role.RELEASER))]
PageAdmin = Annotated[Actor, Depends(PageRule(Where.NAMESPACE, Role.ADMIN))]
PageMember = Annotated[Actor, Depends(PageRule(Where.ANYWHERE))]
PageRegistryAdmin = Annotated[Actor, Depends(PageRule(Where.REGISTRY, Role.ADMIN))]
PageContributor = Annotated[Actor, Depends(PageRule(Where.ANYWHERE, Role.PUBLISHER))]
PageCaller = Annotated[Actor, Depends(PageRule(Where.INSIDE))]


class PageRoute(Route):
    """Shows errors as pages to browsers. Accepts a form only from a page of this server and of the caller's own session
    (`forms`), and reads it only after the route's rule has admitted the caller."""

    def __init__(self, *args: Any, **options: Any) -> None:
        methods = set(options.pop("methods", None) or {"GET"})
        if "GET" in methods:
            methods.add("HEAD")  # which FastAPI, unlike Starlette, does not add
        super().__init__(*args, **{**options, "methods": methods, "include_in_schema": False})

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        answer, rules = super().get_route_handler(), rules_of(self.dependant)

        async def checked(request: Request) -> Response:
            if request.method not in SAFE_METHODS:
                refuse_other_site(request)
                for rule in rules:
                    await rule.before_document(request)
                request.state.form = await read_form(request)
            return await answer(request)

        async def handle(request: Request) -> Response:
            try:
                response = await checked(request)
            except ERRORS as error:
                if "text/html" not in request.headers.get("accept", ""):
                    raise  # a program gets the problem document
                response = error_page(request, as_registry_error(error))
            for name, value in HEADERS.items():  # of redirects too
                response.headers.setdefault(name, value)
            return response

        return handle


def parses(*names: str) -> dict[str, Any]:
    """The `openapi_extra` of a page that reads these query parameters itself; all others are refused."""
    return {"parameters": [{"name": name, "in": "query"} for name in names]}


def error_page(request: Request, error: RegistryError, status: int | None = None) -> Response:
    """The page of an error. What a caller may not see is a 404, as if it did not exist."""
    response = page(request, "error.html", status=status or error.status, error=error)
    for name, value in HEADERS.items():
        response.headers[name] = value
    if error.code == "session_ended":
        drop_session(response)
    return response


CHANNEL = "/{namespace}/{name}@{channel}"


async def _repository(namespace: str, name: str) -> RepositoryName:
    return parse_repository(f"{namespace}/{name}")


async def _channel(channel: str) -> str:
    return parse_name(channel, "channel")


async def _version(version: str) -> Version:
    return parse_version(version)


RepositoryOf = Annotated[RepositoryName, Depends(_repository)]
ChannelOf = Annotated[str, Depends(_channel)]
VersionOf = Annotated[Version, Depends(_version)]


@dataclass(frozen=True, slots=True)
class ChannelRequest:
    """A request about one channel."""

    named: RepositoryName
    channel: str
    request: Request
    resources: Resources

    @property
    def address(self) -> str:
        """The address of the channel's page."""
        return link(str(self.named), channel=self.channel)


async def _channel_request(
    named: RepositoryOf, channel: ChannelOf, request: Request, resources: ResourcesOf
) -> ChannelRequest:
    # Asynchronous, like the dependencies above: FastAPI would call the class itself in a thread.
    return ChannelRequest(named, channel, request, resources)


ChannelRequestOf = Annotated[ChannelRequest, Depends(_channel_request)]
