"""Namespaces and their members."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from registry.database.engine import insert_if_absent
from registry.database.tables import Member, Namespace
from registry.domain.access import audit
from registry.domain.access.audit import Act, Actor
from registry.domain.access.roles import (
    EVERYWHERE,
    Role,
    at_least,
    permit,
    readable,
    refuse_reserved,
    unknown_namespace,
)
from registry.errors import Invalid, Refused
from registry.formats.references import parse_name, refuse_reserved_namespace
from registry.formats.signatures import Covers, fingerprint

MAX_SIGNING_KEYS = 20
NEW_NAMESPACE_BYTES = "new_namespace_bytes"
"""The key in `Session.info` of the quota of a namespace created by this transaction: publishing, grants and commits all
may create one."""
Main = Literal["release", "commit"]


@dataclass(frozen=True, slots=True)
class NamespaceChange:
    """Changes to the columns of a namespace that have these names; None leaves one unchanged."""

    public: bool | None = None
    require_signature: bool | None = None
    signing_keys: Sequence[str] | None = None
    signature_covers: Covers | None = None
    main: Main | None = None
    changes: Literal["one", "two"] | None = None


def find(session: Session, name: str) -> Namespace:
    """The namespace. Raises NotFound."""
    row = session.get(Namespace, name)
    if row is None:
        raise unknown_namespace(name)
    return row


def find_for_share(session: Session, name: str) -> Namespace:
    """Finds like `find`, and locks the row against changes until this transaction ends."""
    row = session.get(Namespace, name, with_for_update={"read": True}, populate_existing=True)
    if row is None:
        raise unknown_namespace(name)
    return row


def find_or_create(session: Session, actor: Actor, name: str) -> Namespace:
    """The namespace, created if the actor is a registry admin."""
    row = session.get(Namespace, name)
    if row is None:
        permit(actor, Role.ADMIN, EVERYWHERE, hidden=unknown_namespace(name))
        refuse_reserved_namespace(name)
        new = insert_if_absent(
            session,
            Namespace,
            name=parse_name(name, "namespace"),
            public=False,
            require_signature=False,
            signing_keys=[],
            signature_covers="release",
            max_bytes=session.info.get(NEW_NAMESPACE_BYTES),
            created_at=actor.at,
            created_by=actor.name,
        )
        if new:
            audit.record(session, actor, Act.NAMESPACE_CREATE, name, namespace=name)
        row = session.get_one(Namespace, name)
    return row


def change(session: Session, actor: Actor, name: str, wanted: NamespaceChange) -> Namespace:
    """Changes the given settings of a namespace, creating it if needed. Waits for transactions that publish under the
    current settings. Raises Refused if it would require signatures without a key."""
    row = find_or_create(session, actor, name)
    session.refresh(row, with_for_update=True)  # waits for transactions that publish under the current settings
    before = _settings(row)
    if any(getattr(wanted, name) not in (None, before[name]) for name in _OF_TWO_ADMINS):
        refuse_alone(actor, row)
    _check_keys(wanted.signing_keys or ())
    for column, value in asdict(wanted).items():
        if value is not None:
            setattr(row, column, value)
    if row.require_signature and not row.signing_keys:
        raise Refused(
            "signing_keys_missing",
            f"{name} cannot require signatures without a signing key.",
            subject=name,
            next_step="Give the keys too: --signing-key PUB.pem, in REST signing_keys.",
        )
    session.flush()
    if wanted.changes == "two":
        _refuse_one_admin(session, row)
    after = _settings(row)
    if after != before:
        audit.record(session, actor, Act.NAMESPACE_SET, name, namespace=name, before=before, after=after)
    return row


def refuse_alone(actor: Actor, row: Namespace) -> None:
    """Raises Refused if the namespace requires a second admin for this change, and none has approved it."""
    if row.changes == "two" and actor.seconded_by is None:
        raise Refused(
            "second_admin_needed",
            f"{row.name} requires a second admin for this.",
            subject=row.name,
            next_step=f"Request it: POST /v1/namespaces/{row.name}/changes, or the same command of `adaptory`.",
        )


def list_page(session: Session, actor: Actor, *, after: str, limit: int) -> list[Namespace]:
    """The namespaces that the actor may read, by name."""
    query = select(Namespace).where(Namespace.name > after, readable(actor, Namespace.name))
    return list(session.scalars(query.order_by(Namespace.name).limit(limit)))


def main_of(row: Namespace) -> Main:
    """The meaning of `main` in its repositories: the setting of an admin or, by default, the newest release where
    signatures are required, else the last commit."""
    if row.main is None:
        return "release" if row.require_signature else "commit"
    return "release" if row.main == "release" else "commit"


def has_drafts(session: Session, name: str) -> bool:
    """Whether commits in the namespace are drafts, which only publishers see, until they are released."""
    row = session.get(Namespace, name)
    return row is not None and main_of(row) == "release"


def signing_keys(session: Session, name: str) -> list[str]:
    """The public keys (PEM) that may sign the namespace's releases; none if it does not exist yet."""
    row = session.get(Namespace, name)
    return list(row.signing_keys) if row else []


def public_names(session: Session) -> frozenset[str]:
    """Names of the namespaces that everyone may read."""
    return frozenset(session.scalars(select(Namespace.name).where(Namespace.public)))


def set_member(session: Session, actor: Actor, namespace: str, user: str, role: Role | None) -> None:
    """Sets a user's role in a namespace (`*` for all); None removes it."""
    if role is not None:
        refuse_reserved(user)
    home = find_or_create(session, actor, namespace) if namespace != EVERYWHERE else None
    if home is not None:
        session.refresh(home, with_for_update={"key_share": True})  # two admins cannot both be the last but one to go
    row = session.get(Member, (user, namespace))
    before = {"role": row.role} if row else {}
    if home is not None and any(at_least(held, Role.RELEASER) for held in (role, before.get("role")) if held):
        refuse_alone(actor, home)
    if role is None:
        session.execute(delete(Member).where(Member.user == user, Member.namespace == namespace))
    elif row is None:
        session.add(Member(user=user, namespace=namespace, role=role))
    else:
        row.role = role
    session.flush()
    if home is not None and home.changes == "two":
        _refuse_one_admin(session, home)
    after = {"role": str(role)} if role else {}
    if before != after:
        where = None if namespace == EVERYWHERE else namespace
        subject = f"{namespace}/members/{user}"
        audit.record(session, actor, Act.MEMBER_SET, subject, namespace=where, before=before, after=after)


def members(session: Session, namespace: str) -> dict[str, str]:
    """The role of each user."""
    rows = session.scalars(select(Member).where(Member.namespace == namespace).order_by(Member.user))
    return {row.user: row.role for row in rows}


def roles_of(session: Session, user: str) -> dict[str, str]:
    """The user's role by namespace."""
    return {row.namespace: row.role for row in session.scalars(select(Member).where(Member.user == user))}


_OF_TWO_ADMINS = ("require_signature", "signing_keys", "signature_covers", "changes")
"""Settings whose change may need a second admin."""


def _refuse_one_admin(session: Session, row: Namespace) -> None:
    """Raises Refused unless two users could approve each other's changes."""
    held = session.execute(select(Member.user, Member.role).where(Member.namespace.in_([row.name, EVERYWHERE])))
    if len({user for user, role in held if at_least(role, Role.ADMIN)}) < 2:
        raise Refused(
            "second_admin_missing",
            f"{row.name} needs two admins while its changes do.",
            subject=row.name,
            next_step=f"Grant someone else the role first: `adaptory namespace grant {row.name} USER admin`.",
        )


def _settings(row: Namespace) -> Mapping[str, Any]:
    return {field.name: getattr(row, field.name) for field in fields(NamespaceChange)}


def _check_keys(keys: Sequence[str]) -> None:
    """Raises Invalid for more than MAX_SIGNING_KEYS keys, and for a key that cannot verify signatures: it would refuse
    every push."""
    if len(keys) > MAX_SIGNING_KEYS:
        raise Invalid("too_many_keys", f"A namespace has at most {MAX_SIGNING_KEYS} signing keys.")
    for key in keys:
        fingerprint(key)
