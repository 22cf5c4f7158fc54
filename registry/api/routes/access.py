"""Tokens, namespaces and their members."""

from typing import Annotated

from fastapi import APIRouter, Path, Response

from registry.api.http.pagination import Cursor, Limit, decode_cursor, page
from registry.api.http.request import ResourcesOf
from registry.api.http.routes import Route
from registry.api.http.rules import Admin, Caller, CallersOf, Member, Reader, RegistryAdmin
from registry.database.tables import Namespace
from registry.domain.access import namespaces, people, quotas, tokens, users
from registry.domain.access.namespaces import NamespaceChange
from registry.domain.access.people import Person
from registry.domain.access.quotas import Quota, RetentionPolicy
from registry.domain.access.roles import EVERYWHERE, Role, permit, permit_everywhere, refuse_anonymous
from registry.domain.access.tokens import NewToken
from registry.domain.catalog import repositories
from registry.domain.channels import promotions, retention
from registry.errors import NotFound, Refused
from registry.formats.references import parse_name
from registry.wire.access import (
    CountingApproval,
    MemberIn,
    MembersOut,
    NamespaceIn,
    NamespaceOut,
    NewTokenOut,
    PersonIn,
    PersonOut,
    QuotaIn,
    RetentionIn,
    RetentionPlanOut,
    TokenIn,
    TokenOut,
    UsageOut,
    UserDetailOut,
    UserOut,
    UserRole,
    WhoOut,
)
from registry.wire.document import Page

router = APIRouter(prefix="/v1", tags=["access"], route_class=Route)

MAX_PLANNED = 500
"""The most releases in a plan of retention."""


@router.get("/whoami")
def who_am_i(actor: Caller) -> WhoOut:
    return WhoOut(user=actor.name, token=actor.token_id, grants=dict(actor.grants), limited=dict(actor.hidden))


@router.post("/tokens", status_code=201)
def create_token(body: TokenIn, resources: ResourcesOf, actor: Member, response: Response) -> NewTokenOut:
    """Create a token. Only this response contains the secret."""
    settings, scope = resources.settings, {namespace: Role(role) for namespace, role in body.scope.items()}
    with resources.write() as session:
        limits = {"default_days": settings.token_days, "max_days": settings.max_token_days}
        lifetime = tokens.lifetime_of(session, actor, body.expires_in_days, **limits)
        row, secret = tokens.create(session, actor, NewToken(body.user or actor.name, body.name, scope, lifetime))
        response.headers["Cache-Control"] = "no-store"
        return NewTokenOut.of(row, token=secret)


@router.get("/tokens")
def list_tokens(resources: ResourcesOf, actor: Member, limit: Limit = 50, cursor: Cursor = None) -> Page[TokenOut]:
    """List your own tokens; all tokens for a registry admin; only itself for a token with a scope."""
    with resources.read() as session:
        rows = tokens.list_page(session, actor, after=decode_cursor(cursor), limit=limit + 1)
        return page([TokenOut.of(row) for row in rows], limit, [row.id for row in rows])


@router.delete("/tokens/{token_id}")
def revoke_token(token_id: str, resources: ResourcesOf, actor: Member, callers: CallersOf) -> TokenOut:
    with resources.write() as session:
        view = TokenOut.of(tokens.revoke(session, actor, token_id))
    callers.forget()
    return view


@router.get("/namespaces")
def list_namespaces(
    resources: ResourcesOf, actor: Caller, limit: Limit = 50, cursor: Cursor = None
) -> Page[NamespaceOut]:
    """List the namespaces that the caller may read."""
    with resources.read() as session:
        rows = namespaces.list_page(session, actor, after=decode_cursor(cursor), limit=limit + 1)
        return page([_namespace_view(row) for row in rows], limit, [row.name for row in rows])


@router.get("/namespaces/{namespace}")
def show_namespace(namespace: str, resources: ResourcesOf, actor: Reader) -> NamespaceOut:
    with resources.read() as session:
        return _namespace_view(namespaces.find(session, namespace))


@router.put("/namespaces/{namespace}")
def set_namespace(
    namespace: str, body: NamespaceIn, resources: ResourcesOf, actor: Admin, callers: CallersOf
) -> NamespaceOut:
    """Change the fields given in the body. Creates the namespace, if the caller is a registry admin."""
    wanted = NamespaceChange(**body.model_dump())
    with resources.write() as session:
        view = _namespace_view(namespaces.change(session, actor, namespace, wanted))
    callers.forget()
    return view


@router.get("/namespaces/{namespace}/usage")
def show_usage(namespace: str, resources: ResourcesOf, actor: Caller) -> UsageOut:
    """The contents of the namespace, and its quota. Not for anonymous callers."""
    permit(actor, Role.READER, namespace)
    refuse_anonymous(actor)
    with resources.snapshot() as session:
        row, used = namespaces.find(session, namespace), quotas.measure(session, namespace, actor.at)
        return UsageOut.of(used, max_bytes=row.max_bytes, max_releases=row.max_releases)


@router.put("/namespaces/{namespace}/quota")
def set_quota(namespace: str, body: QuotaIn, resources: ResourcesOf, actor: RegistryAdmin) -> NamespaceOut:
    """Set the quota of the namespace. Its existing contents stay."""
    permit(actor, Role.ADMIN, namespace)
    with resources.write() as session:
        row = namespaces.find(session, namespace)
        quotas.set_limits(session, actor, row, Quota(body.max_bytes, body.max_releases))
        return _namespace_view(row)


@router.put("/namespaces/{namespace}/retention")
def set_retention(namespace: str, body: RetentionIn, resources: ResourcesOf, actor: Admin) -> NamespaceOut:
    """Set the days after which `gc` takes down yanked releases, pre-releases, and what channels no longer serve."""
    with resources.write() as session:
        row = namespaces.find(session, namespace)
        quotas.set_limits(session, actor, row, RetentionPolicy(**body.model_dump()))
        return _namespace_view(row)


@router.post("/namespaces/{namespace}/retention/plan")
def plan_retention(namespace: str, body: RetentionIn, resources: ResourcesOf, actor: Admin) -> RetentionPlanOut:
    """Show what `gc` would take down now under this retention, and what it would spare. Changes nothing."""
    with resources.read() as session:
        row = namespaces.find(session, namespace)
        planned = retention.plan(session, row.name, RetentionPolicy(**body.model_dump()), actor.at, MAX_PLANNED + 1)
    return RetentionPlanOut(releases=planned[:MAX_PLANNED], more=len(planned) > MAX_PLANNED)


@router.get("/namespaces/{namespace}/members")
def list_members(namespace: str, resources: ResourcesOf, actor: Admin) -> MembersOut:
    """List a namespace's members; with `*`, the roles that hold in all namespaces."""
    with resources.read() as session:
        if namespace != EVERYWHERE:
            namespaces.find(session, namespace)
        return MembersOut(members=namespaces.members(session, namespace))


@router.put("/namespaces/{namespace}/members")
def set_member(namespace: str, body: MemberIn, resources: ResourcesOf, actor: Admin, callers: CallersOf) -> MembersOut:
    role = Role(body.role) if body.role else None
    if namespace == EVERYWHERE:
        permit_everywhere(actor)
    else:
        parse_name(namespace, "namespace")
    with resources.write() as session:
        namespaces.set_member(session, actor, namespace, body.user, role)
        view = MembersOut(members=namespaces.members(session, namespace))
    callers.forget()
    return view


@router.put("/users/{user}/person")
def link_user(
    user: Annotated[str, Path(max_length=128)], body: PersonIn, resources: ResourcesOf, actor: RegistryAdmin
) -> PersonOut:
    """Let a person of the OpenID provider sign in as this user."""
    permit_everywhere(actor)
    issuer = body.issuer or (resources.settings.sign_in and resources.settings.sign_in.issuer)
    if not issuer:
        raise Refused(
            "sign_in_disabled",
            "This registry has no OpenID provider, and the request names none.",
            subject=user,
            next_step="Give `issuer` (--issuer), as the provider's ID tokens have it in `iss`.",
        )
    with resources.write() as session:
        people.link(session, actor, Person(issuer, body.subject, user))
    return PersonOut(user=user, issuer=issuer, subject=body.subject)


@router.get("/users/{user}")
def show_user(
    user: Annotated[str, Path(max_length=128)], resources: ResourcesOf, actor: RegistryAdmin
) -> UserDetailOut:
    """Show a user's roles with their sources, tokens and sessions in force, and approvals that still count."""
    permit_everywhere(actor)
    with resources.read() as session:
        rows, granted = tokens.list_in_force(session, user, actor.at), namespaces.roles_of(session, user)
        person, approvals = people.person_of(session, user), promotions.counting_approvals(session, user)
        if not (rows or granted or person or approvals):
            raise NotFound("user_unknown", f"{user} has no role, no token and no approval here.", subject=user)
        roles = [UserRole(namespace=name, role=role, source="grant") for name, role in sorted(granted.items())]
        roles += [
            UserRole(namespace=name, role=role, source="provider", session=row.id, until=row.expires_at)
            for row in rows
            for name, role in sorted((row.session_roles or {}).items())
        ]
        return UserDetailOut(
            user=user,
            person=PersonOut(user=user, issuer=person.issuer, subject=person.subject) if person else None,
            roles=roles,
            tokens=[TokenOut.of(row) for row in rows],
            approvals=[
                CountingApproval(
                    channel=f"{repositories.name_of(release.repository)}@{row.channel}",
                    version=release.version,
                    at=row.at,
                    reason=row.reason,
                )
                for row, release in approvals
            ],
        )


@router.delete("/users/{user}")
def remove_user(user: str, resources: ResourcesOf, actor: RegistryAdmin, callers: CallersOf) -> UserOut:
    """Put a pseudonym in place of a user's name everywhere, and end the user's tokens, sessions and roles."""
    permit_everywhere(actor)
    with resources.write() as session:
        removed = users.remove(session, actor, user)
    callers.forget()
    return UserOut.of(removed)


def _namespace_view(row: Namespace) -> NamespaceOut:
    return NamespaceOut.of(row, namespace=row.name, main=namespaces.main_of(row))
