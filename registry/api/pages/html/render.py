"""Renders templates into responses, with the headers that protect them."""

import re
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlencode

import orjson
from fastapi import Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from composer.formats.adapters.serving import VLLM_RANKS
from composer.formats.recipes.suite import guard_cost
from registry.api.http.request import SAFE_METHODS
from registry.api.http.rules import callers_of
from registry.api.pages.html import assets, drawings
from registry.api.pages.html.forms import form_token
from registry.domain.access.audit import Actor
from registry.domain.access.roles import ANONYMOUS, Role, granted
from registry.errors import RegistryError
from registry.formats.references import RepositoryName

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "same-origin",
    "Cache-Control": "private, no-store",
    "Vary": "Cookie, Accept",
}
"""The headers of every page; `PageRoute` adds them."""
_METHODS = frozenset(dir(dict))
_CODE = re.compile("`([^`]+)`")
_MINUS = "\N{MINUS SIGN}"


def page(request: Request, template: str, *, status: int = 200, **values: Any) -> Response:
    """The rendered page, or a redirect to `json_address` for a caller that accepts JSON alone.

    Beside `values`, every template knows `viewer` (a name, or None without a session), `publishes` (anywhere),
    `single_user`, `asks_for_secret`, `path`, `origin` (the server's address), `sign_in` (an address) and `form_token`,
    which `parts.csrf()` puts into forms.
    """
    actor: Actor | None = getattr(request.state, "actor", None)
    viewer = actor.name if actor is not None and actor.name != ANONYMOUS else None
    json_address = values.pop("json_address", None)
    if json_address and request.headers.get("accept", "").startswith("application/json"):
        return RedirectResponse(json_address, 302)
    publishes = actor is not None and bool(granted(actor, Role.PUBLISHER))
    known = {"viewer": viewer, "publishes": publishes, "path": request.url.path, "json_address": json_address}
    known |= {"asks_for_secret": request.app.state.secret is not None}
    known |= {"origin": str(request.base_url).rstrip("/"), "single_user": callers_of(request).single_user}
    forms = {"sign_in": _sign_in(request), "form_token": form_token(request)}
    text = _environment().get_template(template).render(**known, **forms, **values)
    return HTMLResponse(text, status)


def page_about(
    request: Request, template: str, named: RepositoryName, *, error: RegistryError | None = None, **values: Any
) -> Response:
    """A page about a repository. `error` is why its form is shown again; the response has its status."""
    return page(
        request,
        template,
        status=error.status if error else 200,
        repository=str(named),
        namespace=named.namespace,
        name=named.name,
        error=error,
        **values,
    )


def redirect(address: str, status: int = 303) -> Response:
    """A redirect. After the default, 303, the browser loads a page, and reloading it does not post the form again."""
    return RedirectResponse(address, status)


def _sign_in(request: Request) -> str:
    """The address of the login page, which returns to this page."""
    here = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    returns = request.method in SAFE_METHODS and here != "/" and not here.startswith(("/login", "/logout"))
    return f"/login?{urlencode({'next': here})}" if returns else "/login"


class _Environment(Environment):
    """Looks names up in a document before its attributes: raising for each missing attribute of a dict took a quarter
    of the time."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        if type(obj) is dict and attribute in obj and attribute not in _METHODS:
            return cast(dict[str, Any], obj)[attribute]
        return super().getattr(obj, attribute)


@cache
def _environment() -> Environment:
    environment = _Environment(
        loader=FileSystemLoader(Path(__file__).parents[1] / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        auto_reload=False,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names: dict[str, Any] = {"asset": assets.address, "draw": drawings, "guard_cost": guard_cost}
    filters: dict[str, Any] = {
        "moment": moment,
        "day": day,
        "machine": machine,
        "size": size,
        "fixed": fixed,
        "change": change,
        "coded": coded,
        "document": document,
        "module": drawings.short,
        "vllm_rank": vllm_rank,
    }
    environment.globals.update(names)  # pyright: ignore[reportUnknownMemberType]  (jinja2 leaves them untyped)
    environment.filters.update(filters)  # pyright: ignore[reportUnknownMemberType]
    return environment


def moment(at: datetime | str) -> str:
    """A time for people: `28 Nov 2026 09:05 UTC`."""
    return f"{_parsed(at):%-d %b %Y %H:%M} UTC"


def day(at: datetime | str) -> str:
    """The day of a time, in UTC, for long tables: `28 Nov 2026`."""
    return f"{_parsed(at):%-d %b %Y}"


def machine(at: datetime | str) -> str:
    """A time for the attribute `datetime`."""
    return _parsed(at).isoformat()


def _parsed(at: datetime | str) -> datetime:
    parsed = datetime.fromisoformat(at) if isinstance(at, str) else at
    return parsed.astimezone(UTC)


def size(size_bytes: float) -> str:
    """Bytes with a decimal unit: `476.3 kB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.1f} {unit}" if unit != "bytes" else f"{size_bytes:.0f} bytes"
        size_bytes /= 1000
    return f"{size_bytes:.1f} TB"


def fixed(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}f}".replace("-", _MINUS)


def change(value: float, digits: int = 3) -> str:
    """A difference with its sign."""
    return f"{value:+.{digits}f}".replace("-", _MINUS)


def coded(message: str) -> Markup:
    """A message in which text between backticks, for terminals, becomes code."""
    parts = _CODE.split(message)
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if at % 2 else escape(part) for at, part in enumerate(parts)
    )


def vllm_rank(rank: int) -> int:
    """The lowest `--max-lora-rank` of vLLM that fits a rank: vLLM accepts only a few values."""
    return next((known for known in VLLM_RANKS if known >= rank), rank)


def document(value: Any) -> str:
    """A JSON document for people."""
    return orjson.dumps(value, option=orjson.OPT_INDENT_2).decode()


def link(repository: str, version: str | None = None, channel: str | None = None) -> str:
    """The address of a repository, a release or a channel."""
    return f"/{repository}" + (f"/{version}" if version else "") + (f"@{channel}" if channel else "")
