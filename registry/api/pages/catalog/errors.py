"""What each error code means and how to fix it: the pages that `help` of a problem document leads to."""

from fastapi import APIRouter, Request, Response

from registry.api.pages.html.render import page
from registry.api.pages.html.wire import PageCaller, PageRoute
from registry.errors import FAMILIES, NotFound
from registry.errors.translation import CODES, family_of, is_registered

router = APIRouter(route_class=PageRoute)


@router.get("/docs/errors")
def list_errors(request: Request, actor: PageCaller) -> Response:
    """Every code by family."""
    families = [(family, sorted(CODES[family].items())) for family in FAMILIES]
    return page(request, "errors.html", families=families)


@router.get("/docs/errors/{code}")
def show_error(code: str, request: Request, actor: PageCaller) -> Response:
    """One code. A code that ends in a name from a file has no general fix: its message says what to do."""
    if not is_registered(code):
        raise NotFound(
            "code_unknown", f"No error has the code {code}.", subject=code, next_step="/docs/errors has all."
        )
    family = family_of(code)
    return page(request, "error_code.html", code=code, family=family, fix=CODES[family].get(code))
