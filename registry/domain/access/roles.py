"""Roles, and the questions that every edge asks: may this actor do that there, and what may it read?

Default deny. What an actor may not read is not there for it: the answer is the 404 of a thing that does not exist.
"""

from enum import StrEnum
from typing import Any

from sqlalchemy import ColumnElement, true
from sqlalchemy.orm import InstrumentedAttribute

from registry.domain.access.audit import Actor
from registry.errors import Invalid, NotAllowed, NotFound, RegistryError, Unauthenticated

EVERYWHERE = "*"
ANONYMOUS = "anonymous"


class Role(StrEnum):
    """From the least to the most; each includes those before it."""

    READER = "reader"
    PUBLISHER = "publisher"
    RELEASER = "releaser"
    ADMIN = "admin"


_ORDER = {role: rank for rank, role in enumerate(Role)}


def min_role(one: str, other: str) -> Role:
    return min(Role(one), Role(other), key=_ORDER.__getitem__)


def max_role(one: str, other: str) -> Role:
    return max(Role(one), Role(other), key=_ORDER.__getitem__)


def holds(actor: Actor, role: Role, namespace: str = EVERYWHERE) -> bool:
    """By a grant alone: a public namespace grants nothing."""
    granted = actor.grants.get(namespace, actor.grants.get(EVERYWHERE))
    return granted is not None and _ORDER[Role(granted)] >= _ORDER[role]


def may(actor: Actor, role: Role, namespace: str) -> bool:
    """By a grant, or as a reader of what is public."""
    return holds(actor, role, namespace) or (role is Role.READER and namespace in actor.public)


def may_read(actor: Actor, namespace: str) -> bool:
    return may(actor, Role.READER, namespace)


def permit(actor: Actor, role: Role, namespace: str = EVERYWHERE, *, hidden: NotFound | None = None) -> None:
    """Returns when the actor has the role there; denies otherwise.

    Where the actor may not even read, it raises `hidden`, the NotFound of what was asked for. Without one the caller
    named the namespace, and the error says which of its own roles there the token's scope hides.
    """
    if may(actor, role, namespace):
        return
    if namespace == EVERYWHERE or may_read(actor, namespace):
        raise _denied(actor, role, namespace)
    raise hidden or _out_of_scope(actor, namespace) or unknown_namespace(namespace)


def permit_somewhere(actor: Actor, role: Role) -> None:
    """For what no namespace owns, such as bases and suites."""
    if not any(holds(actor, role, namespace) for namespace in actor.grants):
        raise _anonymous(actor) or NotAllowed(
            "role_missing",
            f"{actor.name} has the role {role} in no namespace.",
            subject=actor.name,
            next_step=f"Use a token of somebody who is {role} of a namespace, or ask an admin of yours for the role.",
        )


def readable(actor: Actor, namespace: InstrumentedAttribute[Any]) -> ColumnElement[bool]:
    """A condition on a column of namespaces, for queries across them."""
    names = readable_names(actor)
    return true() if names is None else namespace.in_(names)


def readable_names(actor: Actor) -> set[str] | None:
    """The namespaces that the actor may read; None for all of them."""
    return None if EVERYWHERE in actor.grants else {*actor.grants, *actor.public}


def granted(actor: Actor, role: Role) -> list[str] | None:
    """The namespaces where the actor has the role; None for all of them."""
    if holds(actor, role):
        return None
    return sorted(namespace for namespace in actor.grants if holds(actor, role, namespace))


def refuse_reserved(user: str) -> None:
    """Raises Invalid for the name of callers without a token: a user of that name would be taken for all of them."""
    if user.strip().lower() == ANONYMOUS:
        raise Invalid(
            "user_reserved",
            f"{user} is not a user's name: it stands for callers without a token.",
            subject=user,
            next_step="Choose another name. What everybody may read is a public namespace (`adaptory namespace set`).",
        )


def refuse_other_owner(actor: Actor, subject: str, owner: str | None, way_out: str = "choose another name") -> None:
    """Bases, their scores and suites are everybody's yardstick: who did not make one may not change it."""
    if owner is not None and owner != actor.name and not holds(actor, Role.ADMIN):
        raise NotAllowed(
            "not_yours",
            f"{subject} is {owner}'s.",
            subject=subject,
            next_step=f"Ask {owner} or an admin of the registry, or {way_out}.",
        )


def unknown_namespace(namespace: str) -> NotFound:
    return NotFound(
        "namespace_unknown",
        f"There is no namespace {namespace[:64]} that you may see.",
        subject=namespace[:64],
        next_step="Look at its spelling, and at ADAPTORY_TOKEN.",
    )


def _out_of_scope(actor: Actor, namespace: str) -> NotFound | None:
    """It says what the user's roles are, and not whether there is such a namespace."""
    own = actor.hidden.get(namespace, actor.hidden.get(EVERYWHERE))
    if own is None:
        return None
    return NotFound(
        "namespace_unknown",
        f"The scope of this token leaves out the namespace {namespace[:64]}, where {actor.name} has the role {own}.",
        subject=namespace[:64],
        next_step=f"Use a token whose scope has {namespace[:64]}={own}.",
    )


def _anonymous(actor: Actor) -> Unauthenticated | None:
    if actor.name != ANONYMOUS:
        return None
    return Unauthenticated(
        "token_missing", "This needs a token.", next_step="Set ADAPTORY_TOKEN, or send Authorization: Bearer TOKEN."
    )


def _denied(actor: Actor, role: Role, namespace: str) -> RegistryError:
    where = "the whole registry" if namespace == EVERYWHERE else namespace
    own = actor.hidden.get(namespace, actor.hidden.get(EVERYWHERE))
    if own is not None and _ORDER[Role(own)] >= _ORDER[role]:
        return NotAllowed(
            "scope_too_narrow",
            f"{actor.name} has the role {own} in {where}, but the scope of this token does not allow {role}.",
            subject=namespace,
            next_step=f"Use a token whose scope has {namespace}={role}.",
        )
    return _anonymous(actor) or NotAllowed(
        "role_missing",
        f"{actor.name} does not have the role {role} in {where}.",
        subject=namespace,
        next_step=f"Ask an admin of {where} for the role, or use a token whose scope has it.",
    )
