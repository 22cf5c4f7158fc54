"""Forms that withdraw a release: a yank, which channels and ranges skip, and a deprecation, which blocks nothing."""

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request, Response

from registry.api.http.request import ResourcesOf
from registry.api.pages.account import validated
from registry.api.pages.forms import Form, FormOf
from registry.api.pages.paths import RepositoryOf, VersionOf
from registry.api.pages.render import link, page, redirect
from registry.api.pages.wire import ERRORS, PageReleaser, PageRoute, as_registry_error
from registry.api.schemas.catalog import DeprecateIn, YankIn
from registry.database.engine import Session
from registry.database.tables import Release
from registry.domain.access.audit import Actor
from registry.domain.catalog import deprecations, releases
from registry.domain.channels import moves, yanks
from registry.errors import RegistryError
from registry.formats.references import RepositoryName, Version
from registry.transfer.resources import Resources

router = APIRouter(route_class=PageRoute)

RELEASE = "/{namespace}/{name}/{version}"
MAX_SERVING = 10
Act = Callable[[Session, Actor, Release, Form], Any]


@router.get(RELEASE + "/yank")
def show_yank(
    named: RepositoryOf, version: VersionOf, request: Request, resources: ResourcesOf, actor: PageReleaser
) -> Response:
    """What a yank does, and the form for it; of a yanked release, the form that undoes it."""
    return _page(request, resources, "yank.html", named, version)


@router.post(RELEASE + "/yank")
def yank(
    named: RepositoryOf, version: VersionOf, request: Request, resources: ResourcesOf, actor: PageReleaser, form: FormOf
) -> Response:
    """Yanks as REST does, or undoes it, and goes on to the release's page."""
    try:
        _act(resources, actor, named, version, form, _yank)
    except ERRORS as error:
        return _page(request, resources, "yank.html", named, version, as_registry_error(error))
    return redirect(link(str(named), str(version)))


@router.get(RELEASE + "/deprecate")
def show_deprecation(
    named: RepositoryOf, version: VersionOf, request: Request, resources: ResourcesOf, actor: PageReleaser
) -> Response:
    """What a deprecation does, and the form for it."""
    return _page(request, resources, "deprecate.html", named, version)


@router.post(RELEASE + "/deprecate")
def deprecate(
    named: RepositoryOf, version: VersionOf, request: Request, resources: ResourcesOf, actor: PageReleaser, form: FormOf
) -> Response:
    """Deprecates as REST does, or undoes it, and goes on to the release's page."""
    try:
        _act(resources, actor, named, version, form, _deprecate)
    except ERRORS as error:
        return _page(request, resources, "deprecate.html", named, version, as_registry_error(error))
    return redirect(link(str(named), str(version)))


def _yank(session: Session, actor: Actor, release: Release, form: Form) -> None:
    body: YankIn = validated(YankIn, {"reason": form.get("reason", "").strip()})
    (yanks.unyank if form.get("undo") == "yes" else yanks.yank)(session, actor, release, body.reason)


def _deprecate(session: Session, actor: Actor, release: Release, form: Form) -> None:
    undo = form.get("undo") == "yes"
    document = {"reason": None if undo else form.get("reason", "").strip(), "successor": form.get("successor") or None}
    body: DeprecateIn = validated(DeprecateIn, document)
    deprecations.deprecate(session, actor, release, body.reason, body.successor)


def _act(resources: Resources, actor: Actor, named: RepositoryName, version: Version, form: Form, act: Act) -> None:
    with resources.write() as session:
        act(session, actor, releases.find(session, named, version), form)


def _page(
    request: Request,
    resources: Resources,
    template: str,
    named: RepositoryName,
    version: Version,
    error: RegistryError | None = None,
) -> Response:
    with resources.snapshot() as session:
        row = releases.find(session, named, version)
        serving = moves.list_page(session, row.repository, served=row, after="", limit=MAX_SERVING)
        values: dict[str, Any] = {
            "yanked": row.yank_reason if row.yanked else None,
            "deprecated": row.deprecated_reason,
            "successor": row.successor,
            "serving": [channel.name for channel in serving],
        }
    return page(
        request,
        template,
        status=error.status if error else 200,
        repository=str(named),
        namespace=named.namespace,
        name=named.name,
        version=str(version),
        error=error,
        **values,
    )
