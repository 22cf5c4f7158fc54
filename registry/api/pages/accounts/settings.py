"""The settings of a namespace, for its admins: what `adaptory namespace`, `policy`, `publisher` and `suite share` do.

Changes that need a second admin are requested, as the command line does, and wait in the inbox.
"""

from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import TypeAdapter

from registry.api.http.request import ResourcesOf
from registry.api.http.rules import CallersOf
from registry.api.pages.accounts.account import validated
from registry.api.pages.html.forms import Form, FormOf
from registry.api.pages.html.render import page, redirect
from registry.api.pages.html.wire import PageAdmin, PageRegistryAdmin, PageRoute
from registry.database.engine import Session
from registry.domain.access import namespaces, publishers, quotas
from registry.domain.access.audit import Actor
from registry.domain.access.quotas import Quota, RetentionPolicy
from registry.domain.access.roles import Role, holds
from registry.domain.catalog import suite_registration, suites
from registry.domain.changes import requests
from registry.domain.channels import retention
from registry.domain.channels.policy import policies
from registry.errors import RegistryError, Usage
from registry.formats.references import RepositoryName, parse_name
from registry.formats.signatures import fingerprint
from registry.transfer.resources import Resources
from registry.wire.access import PlannedRemoval, QuotaIn, RetentionIn
from registry.wire.changes import Change

router = APIRouter(route_class=PageRoute)

_PAGE = "/{namespace}/-/settings"
_PLANNED = 100
_SUITES = 200
_KEY_END = "-----END PUBLIC KEY-----"
_CHANGE: TypeAdapter[Change] = TypeAdapter(Change)


@router.get(_PAGE)
def show_settings(namespace: str, request: Request, resources: ResourcesOf, actor: PageAdmin) -> Response:
    """No repository is called `-`."""
    return _shown(request, resources, actor, parse_name(namespace, "namespace"))


@router.post("/{namespace}/-/members")
def set_member(
    namespace: str, request: Request, resources: ResourcesOf, actor: PageAdmin, callers: CallersOf, form: FormOf
) -> Response:
    """Add a member, change its role, or remove it with an empty role."""
    change = {"kind": "member", "user": form.get("user", "").strip(), "role": form.get("role") or None}
    return _made(request, resources, actor, callers, namespace, change)


@router.post(_PAGE)
def change_settings(
    namespace: str, request: Request, resources: ResourcesOf, actor: PageAdmin, callers: CallersOf, form: FormOf
) -> Response:
    """Change who may read the namespace and which releases it accepts. Fields that the form lacks stay."""
    settings: dict[str, Any] = {name: form[name] for name in ("signature_covers", "main", "changes") if form.get(name)}
    settings |= {name: form[name] == "yes" for name in ("public", "require_signature") if form.get(name)}
    if "signing_keys" in form:
        blocks = form["signing_keys"].split(_KEY_END)
        settings["signing_keys"] = [f"{block.strip()}\n{_KEY_END}\n" for block in blocks if block.strip()]
    return _made(request, resources, actor, callers, namespace, {"kind": "settings", "settings": settings})


@router.post("/{namespace}/-/retention")
def set_retention(
    namespace: str, request: Request, resources: ResourcesOf, actor: PageAdmin, callers: CallersOf, form: FormOf
) -> Response:
    """Set the rules, or with the button `plan` show what they would take down."""
    wanted: RetentionIn = validated(RetentionIn, _retention(form))
    if form.get("do") != "plan":
        change = {"kind": "retention", "retention": wanted.model_dump()}
        return _made(request, resources, actor, callers, namespace, change)
    name, policy = parse_name(namespace, "namespace"), RetentionPolicy(**wanted.model_dump())
    with resources.read() as session:
        planned = retention.plan(session, name, policy, actor.at, _PLANNED)
    return _shown(request, resources, actor, name, planned=planned, policy=policy)


@router.post("/{namespace}/-/quota")
def set_quota(namespace: str, resources: ResourcesOf, actor: PageRegistryAdmin, form: FormOf) -> Response:
    """Set what the namespace may hold; an empty field is no limit."""
    name = parse_name(namespace, "namespace")
    fields = ("max_bytes", "max_releases")
    body: QuotaIn = validated(QuotaIn, {field: form.get(field, "").strip() or None for field in fields})
    with resources.write() as session:
        quotas.set_limits(session, actor, namespaces.find(session, name), Quota(body.max_bytes, body.max_releases))
    return redirect(f"/{name}/-/settings#quota")


@router.post("/{namespace}/-/suites")
def share_suite(namespace: str, resources: ResourcesOf, actor: PageAdmin, form: FormOf) -> Response:
    """Share a suite of the namespace with all members of the registry, or stop that."""
    name, suite = parse_name(namespace, "namespace"), form.get("suite", "")
    if not suite.startswith(f"{name}/"):
        raise Usage("bad_name", f"{suite[:100]!r} is not a suite of {name}.", subject=suite[:100])
    with resources.write() as session:
        suite_registration.share(session, actor, suite, shared=form.get("shared") == "yes")
    return redirect(f"/{name}/-/settings#suites")


@router.post("/{namespace}/-/publishers/remove")
def remove_publisher(namespace: str, resources: ResourcesOf, actor: PageAdmin, form: FormOf) -> Response:
    """Remove a trusted publisher of a repository, which ends its tokens."""
    name = parse_name(namespace, "namespace")
    repository = RepositoryName(name, parse_name(form.get("repository", ""), "repository name"))
    with resources.write() as session:
        publishers.remove(session, actor, repository, form.get("publisher", ""))
    return redirect(f"/{name}/-/settings#publishers")


def _made(
    request: Request,
    resources: Resources,
    actor: Actor,
    callers: CallersOf,
    namespace: str,
    document: dict[str, Any],
) -> Response:
    """Makes the change, or requests it where the namespace needs a second admin. An error is shown on the page."""
    name = parse_name(namespace, "namespace")
    change: Change = validated(_CHANGE, document)
    try:
        with resources.write() as session:
            namespaces.find(session, name)  # only REST and the command line create one
            waits = requests.make_or_request(session, actor, name, change) is not None
    except RegistryError as error:
        return _shown(request, resources, actor, name, error=error)
    callers.forget()
    return redirect("/inbox" if waits else f"/{name}/-/settings")


def _retention(form: Form) -> dict[str, Any]:
    """The document that REST expects; channels are written `dev=30, canary=60`."""
    channels: dict[str, str] = {}
    for text in filter(None, (part.strip() for part in form.get("channels", "").split(","))):
        name, _, days = text.partition("=")
        channels[parse_name(name.strip(), "channel name")] = days.strip()
    days_of = {field: form.get(field, "").strip() or None for field in ("keep_yanked_days", "keep_prerelease_days")}
    return {**days_of, "keep_channel_days": channels or None}


def _shown(  # noqa: PLR0913
    request: Request,
    resources: Resources,
    actor: Actor,
    name: str,
    *,
    error: RegistryError | None = None,
    planned: list[PlannedRemoval] | None = None,
    policy: RetentionPolicy | None = None,
) -> Response:
    with resources.read() as session:
        row = namespaces.find(session, name)
        facts = {**_facts(session, actor, name), "settings": row, "retention": policy or RetentionPolicy.of(row)}
        keys = [(fingerprint(key)[:12], key) for key in row.signing_keys]
        return page(
            request,
            "settings.html",
            status=error.status if error else 200,
            error=error,
            namespace=name,
            planned=planned,
            keys=keys,
            roles=[role.value for role in Role],
            operator=holds(actor, Role.ADMIN),
            json_address=f"/v1/namespaces/{name}",
            **facts,
        )


def _facts(session: Session, actor: Actor, name: str) -> dict[str, Any]:
    return {
        "members": namespaces.members(session, name),
        "holdings": quotas.measure(session, name, actor.at),
        "policies": policies.of_namespace(session, name),
        "exceptions": policies.exceptions_of_namespace(session, name, actor.at),
        "publishers": publishers.list_in(session, name),
        "suites": suites.list_in(session, name, limit=_SUITES),
    }
