"""Forms that withdraw a release: a yank, after which channels and ranges skip it, and a deprecation, which blocks
nothing."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response

from registry.api.http.problems import as_registry_error
from registry.api.http.request import ResourcesOf
from registry.api.pages.accounts.account import validated
from registry.api.pages.html.forms import Form, FormOf
from registry.api.pages.html.render import link, page_about, redirect
from registry.api.pages.html.wire import ERRORS, PageReleaser, PageRoute, RepositoryOf, VersionOf
from registry.database.engine import Session
from registry.database.tables import Release
from registry.domain.access.audit import Actor
from registry.domain.catalog import deprecations, releases, set_members
from registry.domain.channels import withdrawals
from registry.domain.channels.serving import ServedChange
from registry.domain.rollouts import fleet
from registry.errors import RegistryError, Unavailable
from registry.formats.references import RepositoryName, Version
from registry.transfer.resources import Resources
from registry.wire.catalog import DeprecateIn, YankIn

router = APIRouter(route_class=PageRoute)

RELEASE = "/{namespace}/{name}/{version}"


@dataclass(frozen=True, slots=True)
class Withdrawal:
    """A request about one release, by a caller who may withdraw it."""

    named: RepositoryName
    version: Version
    request: Request
    resources: Resources
    actor: Actor


async def _withdrawal(
    named: RepositoryOf, version: VersionOf, request: Request, resources: ResourcesOf, actor: PageReleaser
) -> Withdrawal:
    return Withdrawal(named, version, request, resources, actor)


YANK_FORM = "yank.html"
WithdrawalOf = Annotated[Withdrawal, Depends(_withdrawal)]
Change = Callable[[Session, Actor, Release, Form], None]


@router.get(RELEASE + "/yank")
def show_yank(asked: WithdrawalOf) -> Response:
    """Explains a yank, and shows its form; for a yanked release, the form that undoes it."""
    return _page(asked, YANK_FORM)


@router.post(RELEASE + "/yank")
def yank(asked: WithdrawalOf, form: FormOf) -> Response:
    """Yanks as REST does, or undoes a yank, then redirects to the release's page."""
    return _withdraw(asked, form, YANK_FORM, _yank)


@router.get(RELEASE + "/deprecate")
def show_deprecation(asked: WithdrawalOf) -> Response:
    """Explains a deprecation, and shows its form."""
    return _page(asked, "deprecate.html")


@router.post(RELEASE + "/deprecate")
def deprecate(asked: WithdrawalOf, form: FormOf) -> Response:
    """Deprecates as REST does, or undoes a deprecation, then redirects to the release's page."""
    return _withdraw(asked, form, "deprecate.html", _deprecate)


def _yank(session: Session, actor: Actor, release: Release, form: Form) -> None:
    body: YankIn = validated(YankIn, {"reason": form.get("reason", "").strip()})
    change = withdrawals.unyank if form.get("undo") == "yes" else withdrawals.yank
    change(session, actor, release, body.reason)


def _deprecate(session: Session, actor: Actor, release: Release, form: Form) -> None:
    undo = form.get("undo") == "yes"
    document = {"reason": None if undo else form.get("reason", "").strip(), "successor": form.get("successor") or None}
    body: DeprecateIn = validated(DeprecateIn, document)
    deprecations.deprecate(session, actor, release, body.reason, body.successor)


def _withdraw(asked: Withdrawal, form: Form, template: str, change: Change) -> Response:
    """Runs the action and redirects to the release's page; if it is refused, shows the form again with the reason."""
    try:
        with asked.resources.write() as session:
            change(session, asked.actor, releases.find(session, asked.named, asked.version), form)
    except ERRORS as error:
        return _page(asked, template, as_registry_error(error))
    return redirect(link(str(asked.named), str(asked.version)))


def _preview(asked: Withdrawal) -> list[ServedChange] | None:
    """The channels that would serve another release; None while this process may only read."""
    try:
        with asked.resources.write() as session:
            row = releases.find(session, asked.named, asked.version)
            if row.revision.taken_down_at is not None:
                return []
            change = withdrawals.unyank if row.yanked else withdrawals.yank
            return withdrawals.preview(session, partial(change, session, asked.actor, row, "as it would be"))
    except Unavailable:
        return None


def _page(asked: Withdrawal, template: str, error: RegistryError | None = None) -> Response:
    """The form; for a yank, it shows the release that each channel would serve."""
    changes = _preview(asked) if template == YANK_FORM else None
    with asked.resources.snapshot() as session:
        row = releases.find(session, asked.named, asked.version)
        values: dict[str, Any] = {
            "taken_down": row.revision.taken_down_at is not None,
            "yanked": row.yank_reason if row.yanked else None,
            "deprecated": row.deprecated_reason,
            "successor": row.successor,
            "changes": changes,
            "loaded_on": fleet.loaded_on(session, row, asked.actor.at),
            "sets": set_members.sets_with(session, asked.actor, row),
        }
    return page_about(asked.request, template, asked.named, error=error, version=str(asked.version), **values)
