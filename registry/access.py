"""Roles, and the one question: may this actor do that in this namespace?"""

from enum import StrEnum

from registry.audit import Actor
from registry.errors import NotAllowed

EVERYWHERE = "*"


class Role(StrEnum):
    """From the least to the most; each includes those before it."""

    READER = "reader"
    PUBLISHER = "publisher"
    RELEASER = "releaser"
    ADMIN = "admin"


_ORDER = list(Role)


def permit(actor: Actor, role: Role, namespace: str = EVERYWHERE) -> None:
    """Returns when the actor has the role there; denies otherwise."""
    granted = actor.grants.get(namespace, actor.grants.get(EVERYWHERE))
    if granted is None or _ORDER.index(Role(granted)) < _ORDER.index(role):
        raise NotAllowed(
            "role_missing",
            f"{actor.name} is not a {role} in {namespace}.",
            subject=namespace,
            next_step="Ask an admin of the namespace for the role.",
        )
