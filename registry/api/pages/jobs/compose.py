"""Build a recipe, plan it, and compose it: what `POST /v1/compositions` does with a recipe from a form."""

from dataclasses import replace
from typing import Any
from urllib.parse import parse_qsl

from fastapi import APIRouter, Request, Response

from composer.formats.recipes.methods import PIPELINES
from composer.formats.recipes.recipe import DTYPES, MAX_INPUTS, taming
from registry.api.http.problems import as_registry_error
from registry.api.http.request import ResourcesOf
from registry.api.http.threads import in_search_threads
from registry.api.pages.catalog.search import known_adapters
from registry.api.pages.html.forms import FormOf
from registry.api.pages.html.render import page, redirect
from registry.api.pages.html.wire import ERRORS, PageContributor, PageRoute, parses
from registry.api.pages.jobs.chosen import Chosen, Fields, values_of
from registry.api.pages.jobs.recipe_form import InputRow, RecipeForm, as_yaml, number
from registry.api.routes.compositions import create_composition
from registry.domain.access.audit import Actor
from registry.domain.catalog import suites
from registry.domain.compositions import compositions
from registry.errors import RegistryError
from registry.formats.references import parse_reference
from registry.transfer.resources import Resources

router = APIRouter(route_class=PageRoute)

FIRST_METHOD = "mean"
"""The method of an empty form: among those that need no examples, it preserves most of the worst member."""
FIRST_VERSION = "1.0.0"
SPARE_ROWS, MORE_ROWS, MAX_SUITES = 2, 6, 60
_PARAMETERS = ("with", "method", "set", "probe", "optimize", "composition", "tame", "guard")


@router.get("/compose", openapi_extra=parses(*_PARAMETERS))
@in_search_threads
def show_compose(request: Request, resources: ResourcesOf, actor: PageContributor) -> Response:
    """A form with a recipe for the adapters in the address, with the one that tames an adapter, or with the recipe of a
    composition and the options in the address."""
    given = parse_qsl(request.url.query)
    form = RecipeForm.of_document(_document(resources, actor, given))
    return _page(request, resources, actor, form)


@router.post("/compose")
def compose(request: Request, resources: ResourcesOf, actor: PageContributor, form: FormOf) -> Response:
    """Plan or compose as REST does, then redirect to the composition's page. Any other button shows the form again:
    with more rows, with the settings of another method, or as text."""
    filled, do = RecipeForm.of_fields(form.multi_items()), form.get("do", "")
    if do not in ("plan", "compose"):
        shown = replace(filled, recipe=as_yaml(filled.document())) if do == "text" else filled
        return _page(request, resources, actor, shown, spare=MORE_ROWS if do == "row" else SPARE_ROWS)
    try:
        created = create_composition(resources, actor, filled.parse(), plan_only=do == "plan")
    except ERRORS as error:
        return _page(request, resources, actor, filled, as_registry_error(error))
    return redirect(f"/compositions/{created.id}")


def _document(resources: Resources, actor: Actor, given: Fields) -> dict[str, Any]:
    """The recipe that the form shows first."""
    options, chosen = dict(given), Chosen.of_address(given)
    if tamed := options.get("tame"):
        adapter = parse_reference(tamed)
        result = f"{adapter.repository}-tamed:{adapter.version or FIRST_VERSION}"
        return taming(tamed, result, values_of(given, "guard"))
    if source := options.get("composition"):
        document = _recipe_of(resources, actor, source)
        if method := options.get("method"):
            document |= {"method": method, "settings": {}}
        own = {name: value for name, _, value in (setting.partition("=") for setting in values_of(given, "set"))}
        document["settings"] = {**(document.get("settings") or {}), **own}
    else:
        document = chosen.document()
        if not chosen.members:
            document["method"] = FIRST_METHOD
    if probe := options.get("probe"):
        document["probe"] = number(probe)
    if options.get("optimize"):
        document["optimize"] = document.get("optimize") or {"search": 8}
    return document


def _recipe_of(resources: Resources, actor: Actor, composition: str) -> dict[str, Any]:
    """The recipe of a composition that the actor may see."""
    composition_id = int(composition) if composition.isdecimal() and len(composition) < 10 else 0
    with resources.read() as session:
        row, job = compositions.find(session, composition_id)
        compositions.permit_look(actor, row, job, hidden=compositions.unknown(composition_id))
        return dict(row.recipe)


def _page(
    request: Request,
    resources: Resources,
    actor: Actor,
    form: RecipeForm,
    error: RegistryError | None = None,
    *,
    spare: int = SPARE_ROWS,
) -> Response:
    with resources.read() as session:
        listed = suites.list_page(session, actor, after=0, limit=MAX_SUITES)
        known = {suite.name: suite.kind for suite in listed if suite.task not in suites.ELSEWHERE}
    rows = [*form.rows, *[InputRow()] * min(spare, MAX_INPUTS - len(form.rows))]
    return page(
        request,
        "compose.html",
        status=error.status if error else 200,
        error=error,
        form=form,
        rows=rows,
        suites=known,
        more_suites=[name for name in form.evaluate if name not in known],
        known=known_adapters(request, resources, actor),
        methods=list(PIPELINES),
        dtypes=DTYPES,
    )
