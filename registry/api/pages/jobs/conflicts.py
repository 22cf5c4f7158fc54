"""Conflict reports of adapters on one base, which the address names."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl

import yaml
from fastapi import APIRouter, Request, Response

from composer.conflicts.view import DEFAULT_MEASURE
from composer.formats.recipes.methods import PIPELINES
from registry.api.http.problems import as_registry_error
from registry.api.http.request import ResourcesOf
from registry.api.http.threads import in_search_threads
from registry.api.pages.accounts.account import validated
from registry.api.pages.catalog.search import known_adapters
from registry.api.pages.html.forms import FormOf
from registry.api.pages.html.render import page, redirect
from registry.api.pages.html.wire import ERRORS, PageCaller, PageRoute, parses
from registry.api.pages.jobs import report
from registry.api.pages.jobs.chosen import Chosen
from registry.api.routes.conflicts import last_check, request_check
from registry.domain.access.audit import Actor
from registry.domain.jobs.queue import FINISHED
from registry.errors import RegistryError, Unauthenticated
from registry.transfer.resources import Resources
from registry.wire.work import MAX_CHECKED, ConflictsIn, ConflictsOut

router = APIRouter(route_class=PageRoute)

WAIT = "wait"
"""The parameter of the page's own requests while a report is computed."""
FIELDS = ("adapter", "weight")
"""The parameters of the form; a redirect shortens the address that they make."""


@router.get("/conflicts", openapi_extra=parses("with", "method", "set", "show", WAIT, *FIELDS, "settings", "drop"))
@in_search_threads
def show_conflicts(request: Request, resources: ResourcesOf, actor: PageCaller) -> Response:
    """The latest report on the chosen adapters, the progress of its computation, or a button that starts it."""
    given = parse_qsl(request.url.query, keep_blank_values=True)
    if any(name in FIELDS for name, _ in given):
        return redirect(Chosen.of_form(given).address("/conflicts"))
    shown = dict(given).get("show", DEFAULT_MEASURE)
    return _page(request, resources, actor, Chosen.of_address(given), shown)


@router.post("/conflicts")
def request_conflicts(request: Request, resources: ResourcesOf, actor: PageCaller, form: FormOf) -> Response:
    """Request the check as REST does, then redirect to its page."""
    chosen = Chosen.of_form(form.multi_items())
    try:
        lock, _ = last_check(resources, actor, validated(ConflictsIn, chosen.document()))
        request_check(resources, actor, lock)
    except ERRORS as error:
        return _page(request, resources, actor, chosen, DEFAULT_MEASURE, _beside_form(error))
    return redirect(chosen.address("/conflicts"))


def _page(
    request: Request,
    resources: Resources,
    actor: Actor,
    chosen: Chosen,
    shown: str,
    error: RegistryError | None = None,
) -> Response:
    check: ConflictsOut | None = None
    if len(chosen.members) > 1 and error is None:
        try:
            _, check = last_check(resources, actor, validated(ConflictsIn, chosen.document()))
        except ERRORS as refused:
            error = _beside_form(refused)
    stated = check.report if check else None
    finished = check is None or stated is not None or check.state in FINISHED  # a report is kept before its job ends
    document: Mapping[str, Any] = chosen.document()
    answer = page(
        request,
        "conflicts.html",
        status=error.status if error else 200,
        chosen=chosen,
        error=error,
        check=check,
        finished=finished,
        **report.shown(stated, report.options_of(chosen), shown, lambda name: chosen.address("/conflicts", show=name)),
        known=known_adapters(request, resources, actor, check.base.digest if check else None),
        methods=list(PIPELINES),
        most=MAX_CHECKED,
        recipe=yaml.safe_dump({name: value for name, value in document.items() if value}, sort_keys=False),
        command=_command(chosen),
        json_address=f"/v1/conflicts/{check.id}" if check else None,
    )
    if WAIT in request.query_params and finished:
        answer.headers["HX-Refresh"] = "true"  # htmx then loads the page with its report
    return answer


def _beside_form(error: Exception) -> RegistryError:
    """Returns an error that the form can fix. Raises one that signing in fixes."""
    if isinstance(error, Unauthenticated):
        raise error
    return as_registry_error(error)


def _command(chosen: Chosen) -> str:
    weights = [weight for _, weight in chosen.members]
    lines = ["adaptory conflicts", *(adapter for adapter, _ in chosen.members)]
    if set(weights) - {"1"}:
        lines.append(f"--weights {','.join(weights)}")
    lines += [f"--method {chosen.method}"] if chosen.method != "stack" else []
    lines += [f"--set {setting}" for setting in chosen.settings]
    return " \\\n  ".join(lines)
