"""Roles and access checks: whether an actor may do something in a namespace, and what it may read.

Denies by default. An object that the actor may not read and one that does not exist get the same 404.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy import ColumnElement, or_, true
from sqlalchemy.orm import InstrumentedAttribute

from registry.domain.access.audit import Actor
from registry.errors import Invalid, NotAllowed, NotFound, RegistryError, Unauthenticated

EVERYWHERE = "*"
ANONYMOUS = "anonymous"
REGISTRY = "registry"
"""The actor of what the registry itself does."""


class Role(StrEnum):
    """The ladder of reader, publisher, releaser and admin, where each role includes those before it, and beside it
    `agent`, a reader that also reports what servers have loaded. No role of the ladder includes it; the last three
    roles join both."""

    READER = "reader"
    AGENT = "agent"
    PUBLISHER = "publisher"
    RELEASER = "releaser"
    ADMIN = "admin"
    PUBLISHER_AGENT = "publisher+agent"
    RELEASER_AGENT = "releaser+agent"
    ADMIN_AGENT = "admin+agent"


UNRESTRICTED = {EVERYWHERE: Role.ADMIN_AGENT.value}
"""The grants of the user of a registry without access control."""

_LADDER = (Role.READER, Role.PUBLISHER, Role.RELEASER, Role.ADMIN)
_STEPS = {Role.AGENT: frozenset({Role.READER, Role.AGENT})} | {
    role: frozenset(_LADDER[: rank + 1]) for rank, role in enumerate(_LADDER)
}
_INCLUDED = {role: frozenset[Role]().union(*(_STEPS[Role(part)] for part in role.split("+"))) for role in Role}
_BY_INCLUDED = {included: role for role, included in _INCLUDED.items()}
"""Also has the intersection and the union of any two of its keys."""


def min_role(one: str, other: str) -> Role:
    """The role that may do what both roles may."""
    return _BY_INCLUDED[_INCLUDED[Role(one)] & _INCLUDED[Role(other)]]


def max_role(one: str, other: str) -> Role:
    """The role that may do what either role may."""
    return _BY_INCLUDED[_INCLUDED[Role(one)] | _INCLUDED[Role(other)]]


def limited(role: str, limit: str) -> Role:
    """The role that a token leaves whose scope names `limit`. As a limit, admin leaves every role as it is."""
    return Role(role) if limit == Role.ADMIN else min_role(role, limit)


def at_least(one: str, role: Role) -> bool:
    """Whether a role includes another."""
    return _INCLUDED[role] <= _INCLUDED[Role(one)]


def holds(actor: Actor, role: Role, resource: str = EVERYWHERE) -> bool:
    """Whether a grant gives the role in a namespace or in NAMESPACE/NAME; public namespaces grant nothing."""
    granted = actor.grants.get(resource) or actor.grants.get(_namespace(resource)) or actor.grants.get(EVERYWHERE)
    return granted is not None and at_least(granted, role)


def may(actor: Actor, role: Role, resource: str) -> bool:
    """Whether the actor has the role by a grant, or as a reader of a public namespace."""
    return holds(actor, role, resource) or (role is Role.READER and _namespace(resource) in actor.public)


def may_read(actor: Actor, namespace: str) -> bool:
    return may(actor, Role.READER, namespace)


def administers(actor: Actor, namespace: str | None) -> bool:
    """Whether an admin of the registry is one in the namespace too: a token's scope may be narrower there."""
    return holds(actor, Role.ADMIN) and holds(actor, Role.ADMIN, namespace or EVERYWHERE)


def permit(actor: Actor, role: Role, resource: str = EVERYWHERE, *, hidden: NotFound | None = None) -> None:
    """Raises unless the actor has the role in a namespace, or in the repository NAMESPACE/NAME.

    If the actor may not even read there, raises `hidden`, the NotFound of the requested object. Without `hidden`, the
    caller named the namespace itself, and the error says which of its own roles the token's scope hides.
    """
    if may(actor, role, resource):
        return
    namespace = _namespace(resource)
    if namespace == EVERYWHERE or may_read(actor, namespace):
        raise _denied(actor, role, namespace)
    raise hidden or _out_of_scope(actor, role, namespace) or unknown_namespace(namespace)


def permit_everywhere(actor: Actor) -> None:
    """Raises unless the actor is an admin of the registry and of every namespace (a token's scope may exclude some).
    Required for changes to roles in all of them."""
    for resource in (EVERYWHERE, *namespaces_of(actor)):
        permit(actor, Role.ADMIN, resource)


def permit_uploads(actor: Actor, namespace: str, *, hidden: NotFound | None = None) -> None:
    """Raises unless the actor may publish in the namespace or in a repository of it, whose files are uploaded to the
    namespace."""
    resources = (resource for resource in actor.grants if _namespace(resource) == namespace)
    if not any(holds(actor, Role.PUBLISHER, resource) for resource in resources):
        permit(actor, Role.PUBLISHER, namespace, hidden=hidden)


def permit_somewhere(actor: Actor, role: Role) -> None:
    """Raises unless the actor has the role in any namespace: for bases and suites, which no namespace owns. A grant for
    one repository is not enough."""
    if not any(holds(actor, role, namespace) for namespace in namespaces_of(actor)):
        raise _anonymous(actor) or NotAllowed(
            "role_missing",
            f"{actor.name} does not have the role {role} in any namespace.",
            subject=actor.name,
            next_step=f"Use a token that has the role {role} in a namespace, or ask an admin of your namespace for it.",
        )


def refuse_anonymous(actor: Actor) -> None:
    """Raises Unauthenticated for a caller without a token."""
    if error := _anonymous(actor):
        raise error


def readable(actor: Actor, namespace: InstrumentedAttribute[Any]) -> ColumnElement[bool]:
    """A SQL condition on a namespace column: the actor may read it."""
    names = readable_names(actor)
    return true() if names is None else namespace.in_(names)


def readable_names(actor: Actor) -> set[str] | None:
    """The namespaces that the actor may read; None for all."""
    return None if EVERYWHERE in actor.grants else {*namespaces_of(actor), *actor.public}


@dataclass(frozen=True, slots=True)
class Reach:
    """The namespaces in which an actor has a role: `only` those, or with None all of them and what belongs to none,
    `but` those whose own grant is less."""

    only: frozenset[str] | None
    but: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return self.only is None or bool(self.only)

    def within(self, namespace: InstrumentedAttribute[Any]) -> ColumnElement[bool]:
        """A SQL condition on a namespace column, which may be null."""
        if self.only is not None:
            return namespace.in_(self.only)
        return or_(namespace.is_(None), namespace.not_in(self.but)) if self.but else true()


def granted(actor: Actor, role: Role) -> Reach:
    """The namespaces where the actor has the role. The grant for a namespace counts, not the one for all."""
    named = frozenset(namespace for namespace in namespaces_of(actor) if namespace != EVERYWHERE)
    having = frozenset(namespace for namespace in named if holds(actor, role, namespace))
    return Reach(None, named - having) if holds(actor, role) else Reach(having)


def namespaces_of(actor: Actor) -> list[str]:
    """The namespaces, or `*`, for which the actor has a grant, without the grants for single repositories."""
    return [resource for resource in actor.grants if "/" not in resource]


def refuse_reserved(user: str) -> None:
    """Raises Invalid for the names of anonymous callers and of the registry itself: a user of that name could be
    confused with them, and report figures as the registry does."""
    stands_for = {ANONYMOUS: "callers without a token", REGISTRY: "the registry itself"}.get(user.strip().lower())
    if stands_for is not None:
        raise Invalid(
            "user_reserved",
            f"{user} cannot be a user name: it stands for {stands_for}.",
            subject=user,
            next_step="Choose another name. To let everyone read, make a namespace public (`adaptory namespace set`).",
        )


def owns(actor: Actor, owner: str | None, namespace: str = EVERYWHERE) -> bool:
    """Whether the actor may change something that others rely on: a base, its scores, a suite."""
    return owner is None or owner == actor.name or holds(actor, Role.ADMIN, namespace)


def refuse_other_owner(
    actor: Actor, subject: str, owner: str | None, way_out: str = "choose another name", *, namespace: str = EVERYWHERE
) -> None:
    """Raises NotAllowed unless the actor owns the subject, which may belong to a namespace."""
    if not owns(actor, owner, namespace):
        admin = "an admin of the registry" if namespace == EVERYWHERE else f"an admin of {namespace}"
        raise NotAllowed(
            "not_yours",
            f"{subject} belongs to {owner}.",
            subject=subject,
            next_step=f"Ask {owner} or {admin}, or {way_out}.",
        )


def unknown_namespace(namespace: str) -> NotFound:
    """The error for a namespace that does not exist or that the actor may not see."""
    return NotFound(
        "namespace_unknown",
        f"Namespace {namespace[:64]} does not exist, or you have no access to it.",
        subject=namespace[:64],
    )


def _namespace(resource: str) -> str:
    return resource.partition("/")[0]


def _out_of_scope(actor: Actor, role: Role, namespace: str) -> NotFound | None:
    """The error that names the user's role and the required one, but does not reveal whether the namespace exists."""
    own = actor.hidden.get(namespace, actor.hidden.get(EVERYWHERE))
    if own is None:
        return None
    return NotFound(
        "namespace_unknown",
        f"This token's scope excludes the namespace {namespace[:64]}, where {actor.name} has the role {own}.",
        subject=namespace[:64],
        next_step=f"Use a token whose scope includes {namespace[:64]}={role}.",
    )


def _anonymous(actor: Actor) -> Unauthenticated | None:
    if actor.name != ANONYMOUS:
        return None
    return Unauthenticated("token_missing", "This needs a token.")


def _denied(actor: Actor, role: Role, namespace: str) -> RegistryError:
    where = "the whole registry" if namespace == EVERYWHERE else namespace
    own = actor.hidden.get(namespace, actor.hidden.get(EVERYWHERE))
    if own is not None and at_least(own, role):
        return NotAllowed(
            "scope_too_narrow",
            f"{actor.name} has the role {own} in {where}, but this token's scope does not allow {role}.",
            subject=namespace,
            next_step=f"Use a token whose scope includes {namespace}={role}.",
        )
    return _anonymous(actor) or NotAllowed(
        "role_missing",
        f"{actor.name} does not have the role {role} in {where}.",
        subject=namespace,
        next_step=f"Ask an admin of {where} for the role, or use a token whose scope includes it.",
    )
