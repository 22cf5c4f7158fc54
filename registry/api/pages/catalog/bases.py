"""Bases, suites and error codes."""

from typing import Any

from fastapi import APIRouter, Request, Response

from registry.api.http.pagination import Cursor, decode_cursor, decode_number, first_rows
from registry.api.http.request import ResourcesOf
from registry.api.pages.html import scores
from registry.api.pages.html.render import page
from registry.api.pages.html.wire import PageCaller, PageMember, PageRoute
from registry.api.routes.views import base_page, base_view, suite_page, suite_view
from registry.domain.catalog import bases, suites
from registry.domain.catalog.suites import ELSEWHERE
from registry.errors import FAMILIES, NotFound
from registry.errors.translation import CODES, family_of, is_registered

router = APIRouter(route_class=PageRoute)

SHOWN = 25
EXAMPLES = 20


@router.get("/bases")
def list_bases(request: Request, resources: ResourcesOf, actor: PageMember, cursor: Cursor = None) -> Response:
    with resources.read() as session:
        rows = bases.list_page(session, after=decode_cursor(cursor), limit=SHOWN + 1)
        listed, more = first_rows(rows, SHOWN, lambda row: row.name)
        views = base_page(session, listed)
    return page(request, "bases.html", bases=views, more=more, first=cursor is None, json_address="/v1/bases")


@router.get("/bases/{base:path}")
def show_base(base: str, request: Request, resources: ResourcesOf, actor: PageMember) -> Response:
    """A base by digest, name or alias."""
    with resources.read() as session:
        view = base_view(session, bases.find(session, base))
    return page(
        request,
        "base_model.html",
        base=view,
        scores=scores.lines(view.scores, [], []),
        json_address=f"/v1/bases/{base}",
    )


@router.get("/suites")
def list_suites(request: Request, resources: ResourcesOf, actor: PageMember, cursor: Cursor = None) -> Response:
    with resources.read() as session:
        rows = suites.list_page(session, actor, after=decode_number(cursor), limit=SHOWN + 1)
        listed, more = first_rows(rows, SHOWN, lambda row: row.id)
        views = suite_page(session, listed)
    return page(request, "suites.html", suites=views, more=more, first=cursor is None, json_address="/v1/suites")


@router.get("/suites/{suite:path}")
def show_suite(suite: str, request: Request, resources: ResourcesOf, actor: PageMember) -> Response:
    """A suite with the first of its examples, by name, `NAME@VERSION` or digest."""
    with resources.read() as session:
        view = suite_view(session, suites.find_readable(session, suite, actor))
    content: dict[str, Any] = view.content or {}
    return page(
        request,
        "suite.html",
        suite=view,
        elsewhere=ELSEWHERE.get(view.task),
        description=content.get("description"),
        examples=content.get("examples", [])[:EXAMPLES],
        json_address=f"/v1/suites/{suite}",
    )


@router.get("/docs/errors")
def list_errors(request: Request, actor: PageCaller) -> Response:
    """All codes by family."""
    families = [(family, sorted(CODES[family].items())) for family in FAMILIES]
    return page(request, "errors.html", families=families)


@router.get("/docs/errors/{code}")
def show_error(code: str, request: Request, actor: PageCaller) -> Response:
    """Shows one code. A code that ends in a name from a file has no text here: its message states the next step."""
    if not is_registered(code):
        raise NotFound(
            "code_unknown", f"No error has the code {code}.", subject=code, next_step="/docs/errors has all."
        )
    family = family_of(code)
    return page(request, "error_code.html", code=code, family=family, fix=CODES[family].get(code))
