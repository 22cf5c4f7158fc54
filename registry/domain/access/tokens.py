"""Tokens: created, shown once, stored as a hash, checked on every request, revoked.

    adp_<id: 12 of a-z2-7>_<secret: 64 hexadecimal digits><checksum: 8 hexadecimal digits>

Secrets of browser sessions begin with `ads_` instead, and are checked by pages alone (`sessions`).
The id finds the row. The secret has 256 random bits, so a plain SHA-256 protects it. The checksum detects a mistyped
token, or a token in a leaked file, without asking the registry.
"""

import base64
import hashlib
import hmac
import re
import secrets
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import cast

from sqlalchemy import ColumnElement, delete, false, or_, select, true, update
from sqlalchemy.orm import Session

from registry.database.engine import insert_if_absent
from registry.database.tables import Token, TrustedPublisher, UsedIdToken
from registry.domain.access import audit, namespaces
from registry.domain.access.audit import Act, Actor
from registry.domain.access.roles import EVERYWHERE, UNRESTRICTED, Role, holds, limited, max_role, refuse_reserved
from registry.errors import Invalid, NotAllowed, NotFound, Unauthenticated
from registry.formats.references import parse_name

FULL_SCOPE = {EVERYWHERE: Role.ADMIN.value}
"""The scope of a token that may do everything its user may."""
TOKEN, SESSION = "adp", "ads"
"""The prefixes of secrets. They are hashed with the rest, so that neither kind passes for the other."""
_SHAPE = re.compile(r"((ad[ps])_([a-z2-7]{12})_[0-9a-f]{64})([0-9a-f]{8})")


@dataclass(frozen=True, slots=True)
class NewToken:
    """`scope` maps namespaces, or `*`, to the token's highest role there, also limited by the user's own roles."""

    user: str
    name: str
    scope: Mapping[str, Role]
    lifetime: timedelta | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """The user of a token and its grants; server processes may cache it for some seconds."""

    user: str
    token_id: str
    grants: Mapping[str, str]
    mints: bool
    expires_at: datetime | None
    hidden: Mapping[str, str]
    """The user's own roles where the scope allows a lower one or none."""
    last_used_at: datetime | None = None


def create(session: Session, actor: Actor, new: NewToken) -> tuple[Token, str]:
    """Creates a token. Returns it and its secret text, which is not stored.

    A scoped token cannot create tokens: it could widen itself.
    """
    if not actor.mints or (new.user != actor.name and not holds(actor, Role.ADMIN)):
        raise NotAllowed(
            "token_not_allowed",
            f"{actor.name} may not create this token with the current one.",
            subject=new.user,
        )
    refuse_reserved(new.user)
    scope = {
        namespace if namespace == EVERYWHERE else parse_name(namespace, "namespace"): role.value
        for namespace, role in new.scope.items()
    }
    row, text = add(session, actor, new, scope)
    after = {"user": row.user, "scope": row.scope, "expires_at": row.expires_at.isoformat() if row.expires_at else None}
    audit.record(session, actor, Act.TOKEN_CREATE, f"token/{row.id}", namespace=None, after=after)
    return row, text


def lifetime_of(
    session: Session, actor: Actor, days: float | None, *, default_days: float, max_days: float
) -> timedelta:
    """The lifetime of a new token: `days`, or the default. Raises Invalid beyond the maximum.

    A token cannot create one that outlives it, so that a stolen one ends: raises NotAllowed. Sign-ins by a provider and
    admins of the registry may.
    """
    most = timedelta(days=max_days)
    left = None if holds(actor, Role.ADMIN) else _time_left(session, actor)
    if days is None:
        return min(timedelta(days=default_days), most, left or most)
    if (wanted := timedelta(days=days)) > most:
        raise Invalid("token_too_long", f"A token lasts at most {max_days:g} days here, not {days:g}.")
    if left is not None and wanted > left:
        raise NotAllowed(
            "token_not_allowed",
            f"The token would outlive the current one, which ends in {left / timedelta(days=1):.1f} days.",
            subject=actor.name,
            next_step="Ask for fewer days, sign in through your provider, or ask a registry admin for a token.",
        )
    return wanted


def _time_left(session: Session, actor: Actor) -> timedelta | None:
    """The remaining lifetime of the actor's token, also of one that began a session; None without an end."""
    row = session.get(Token, actor.token_id) if actor.token_id else None
    if row is not None and row.session:
        row = session.get(Token, row.parent_id) if row.parent_id else None
    return row.expires_at - actor.at if row is not None and row.expires_at is not None else None


def add(
    session: Session, actor: Actor, new: NewToken, scope: Mapping[str, str], publisher_id: str | None = None
) -> tuple[Token, str]:
    """Adds the row of a token, without a check and without an audit row. Returns it and its secret text."""
    token_id, sha256, text = new_secret(TOKEN)
    row = Token(
        id=token_id,
        user=new.user,
        name=new.name,
        secret_sha256=sha256,
        scope=dict(scope),
        created_at=actor.at,
        created_by=actor.name,
        expires_at=actor.at + new.lifetime if new.lifetime is not None else None,
        revoked_at=None,
        publisher_id=publisher_id,
        last_used_at=None,
    )
    session.add(row)
    session.flush()
    return row, text


def new_secret(kind: str) -> tuple[str, str, str]:
    """The id of a new token or session, the stored hash of its secret, and the text for its user."""
    token_id = random_id()
    body = f"{kind}_{token_id}_{secrets.token_hex(32)}"
    return token_id, _hash(body), body + _checksum(body)


def random_id() -> str:
    """Twelve characters with 60 random bits."""
    return base64.b32encode(secrets.token_bytes(8)).decode().lower()[:12]


def revoke(session: Session, actor: Actor, token_id: str) -> Token:
    """Revokes one of the actor's tokens, or any token for a registry admin, and the sessions begun with it. Idempotent.

    A scoped token can revoke only itself and its sessions: a leaked one must not lock its user out.
    """
    row = session.scalar(select(Token).where(Token.id == token_id, _in_reach(actor)))
    if row is None:
        raise NotFound(
            "token_unknown",
            f"With the current token you cannot revoke a token {token_id[:16]}.",
            subject=token_id[:16],
        )
    if row.revoked_at is None:
        row.revoked_at = actor.at
        session.flush()
        begun = (Token.parent_id == row.id) & Token.revoked_at.is_(None)
        session.execute(update(Token).where(begun).values(revoked_at=actor.at))
        audit.record(session, actor, Act.TOKEN_REVOKE, f"token/{row.id}", namespace=None, before={"user": row.user})
    return row


def list_page(session: Session, actor: Actor, *, after: str, limit: int) -> list[Token]:
    """The tokens that the actor may revoke, by id."""
    query = select(Token).where(_in_reach(actor), Token.id > after).order_by(Token.id).limit(limit)
    return list(session.scalars(query))


def list_own_in_force(session: Session, actor: Actor, *, limit: int) -> list[Token]:
    """The actor's own tokens and sessions that it may revoke and that have not ended, newest first."""
    in_force = Token.revoked_at.is_(None) & or_(Token.expires_at.is_(None), Token.expires_at > actor.at)
    query = select(Token).where(_in_reach(actor), Token.user == actor.name, in_force)
    return list(session.scalars(query.order_by(Token.created_at.desc(), Token.id).limit(limit)))


def use_once(session: Session, replay_key: str, expires_at: datetime, now: datetime) -> None:
    """Notes that a token of another issuer was used. Raises Unauthenticated for one that was used before. Records of
    tokens that have expired go."""
    session.execute(delete(UsedIdToken).where(UsedIdToken.expires_at < now))
    if not insert_if_absent(session, UsedIdToken, sha256=replay_key, expires_at=expires_at):
        raise Unauthenticated(
            "id_token_used",
            "The ID token was exchanged before, or used otherwise.",
            next_step="Request a new one for each exchange; the token that you get is valid for an hour.",
        )


def list_in_force(session: Session, user: str, now: datetime) -> list[Token]:
    """The tokens and sessions of a user that have not ended, newest first."""
    in_force = Token.revoked_at.is_(None) & or_(Token.expires_at.is_(None), Token.expires_at > now)
    return list(session.scalars(select(Token).where(Token.user == user, in_force).order_by(Token.created_at.desc())))


def exist(session: Session) -> bool:
    """Whether there is a token that is not revoked."""
    query = select(Token.id).where(Token.revoked_at.is_(None), ~Token.session).limit(1)
    return session.scalars(query).first() is not None


def authenticate(session: Session, text: str, now: datetime) -> Caller:
    """The caller of a token. Raises Unauthenticated for anything but a valid token."""
    row = find_secret(session, text, now, TOKEN)
    if row.publisher_id is not None:
        if session.get(TrustedPublisher, row.publisher_id) is None:
            raise _invalid("came from a trusted publisher that was removed")
        return _caller(row, row.scope, {}, mints=False)
    return caller_of(session, row, mints=mints(row))


def find_secret(session: Session, text: str, now: datetime, kind: str) -> Token:
    """The row of a token or a session by its secret. Raises Unauthenticated unless it is in force."""
    match = _SHAPE.fullmatch(text)
    if match is None or _checksum(match.group(1)) != match.group(4):
        raise _invalid("is incomplete or mistyped")
    if match.group(2) != kind:
        raise _invalid("is the secret of a browser session, which only pages accept")
    row = session.get(Token, match.group(3))
    if row is None or not hmac.compare_digest(row.secret_sha256, _hash(match.group(1))):
        raise _invalid("is unknown here")
    if row.revoked_at is not None:
        raise _invalid("was revoked")
    if row.expires_at is not None and row.expires_at <= now:
        raise _invalid("has expired")
    return row


def mints(row: Token) -> bool:
    """Whether the token may create others."""
    return row.scope == FULL_SCOPE


def caller_of(session: Session, row: Token, *, mints: bool) -> Caller:
    """The actor behind a token or a session."""
    roles = _roles(session, row)
    grants, own = effective_grants(roles, row.scope), effective_grants(roles, FULL_SCOPE)
    everywhere = own.get(EVERYWHERE, "")
    roles_there = {name: own.get(name, everywhere) for name in {*grants, *own}}
    hidden = {name: role for name, role in roles_there.items() if grants.get(name) != role}
    return _caller(row, grants, hidden, mints=mints)


def _caller(row: Token, grants: Mapping[str, str], hidden: Mapping[str, str], *, mints: bool) -> Caller:
    return Caller(
        user=row.user,
        token_id=row.id,
        grants=grants,
        mints=mints,
        expires_at=row.expires_at,
        hidden=hidden,
        last_used_at=row.last_used_at,
    )


def is_first_use(caller: Caller, now: datetime) -> bool:
    """Whether the token was not used before in this hour."""
    return caller.last_used_at is None or caller.last_used_at < _hour(now)


def record_use(session: Session, token_id: str, now: datetime) -> None:
    """Records that the token was used in this hour, once an hour: a write for each request would cost more than the
    requests."""
    unrecorded = or_(Token.last_used_at.is_(None), Token.last_used_at < _hour(now))
    session.execute(update(Token).where(Token.id == token_id, unrecorded).values(last_used_at=_hour(now)))


def grants_of(session: Session, token_id: str) -> dict[str, str]:
    """The token's current grants; none once it is revoked, or was removed after it had expired.

    For work that continues after the request: expiry since then is ignored.
    """
    row = session.get(Token, token_id)
    if row is None:
        return {}
    if row.publisher_id is not None:
        known = not row.revoked_at and session.get(TrustedPublisher, row.publisher_id) is not None
        return dict(row.scope) if known else {}
    return {} if row.revoked_at else effective_grants(_roles(session, row), row.scope)


def roles_given(session: Session, token_id: str, now: datetime) -> dict[str, str]:
    """The roles that an approval gets from its token, besides the user's own: those of a trusted publisher's rule, or
    those that a provider grants the user in a session that is in force now. None once the token is revoked."""
    row = session.get(Token, token_id)
    if row is None or row.revoked_at is not None or row.publisher_id is not None:
        return grants_of(session, token_id)
    if row.session_roles is None:
        return {}
    in_force = Token.revoked_at.is_(None) & (Token.expires_at > now)
    own = select(Token.session_roles).where(Token.user == row.user, Token.session, in_force)
    given: dict[str, str] = {}
    for roles in session.scalars(own):
        for name, role in cast("dict[str, str]", roles or {}).items():
            given[name] = max_role(given.get(name, role), role).value
    return given


def actor_now(session: Session, user: str, token_id: str | None, source: str | None, now: datetime) -> Actor:
    """The requester of work that continues after the request, with the token's current grants.

    Without a token, it was the user of a registry without access control, who may do everything.
    """
    grants = grants_of(session, token_id) if token_id else UNRESTRICTED
    return Actor(user, now, grants, public=namespaces.public_names(session), token_id=token_id, source=source)


def _roles(session: Session, row: Token) -> dict[str, str]:
    """The user's role by namespace; for a session, at least the role that its provider grants."""
    roles = namespaces.roles_of(session, row.user)
    given: Mapping[str, str] = row.session_roles or {}
    for namespace, role in given.items():
        roles[namespace] = max_role(roles.get(namespace, role), role).value
    return roles


def effective_grants(roles: Mapping[str, str], scope: Mapping[str, str]) -> dict[str, str]:
    """The user's role in each namespace, within the limit of the token's."""
    grants: dict[str, str] = {}
    everywhere = roles.get(EVERYWHERE)
    for namespace in {*roles, *(scope if everywhere else ())}:
        own = roles.get(namespace)
        role = max_role(own, everywhere) if own and everywhere else own or everywhere
        limit = scope.get(namespace, scope.get(EVERYWHERE))
        if role and limit:
            grants[namespace] = limited(role, limit).value
    return grants


def _in_reach(actor: Actor) -> ColumnElement[bool]:
    """The tokens that the actor may see and revoke."""
    if actor.token_id is None and not actor.mints:
        return false()
    if not actor.mints:
        return or_(Token.id == actor.token_id, Token.parent_id == actor.token_id)
    return true() if holds(actor, Role.ADMIN) else Token.user == actor.name


def _hour(now: datetime) -> datetime:
    return now.replace(minute=0, second=0, microsecond=0)


def _invalid(what: str) -> Unauthenticated:
    return Unauthenticated(
        "token_invalid",
        f"The token {what}.",
        next_step="Create one with `adaptory token create`, and set ADAPTORY_TOKEN.",
    )


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"
