"""Browser sessions: begun with a token or by an OpenID provider, for half a day, on pages alone.

A session is a kind of token, and is listed and revoked like one. It has the rights of its parent token, and ends with
it.
"""

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timedelta

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from registry.database.tables import ProviderUser, Token
from registry.domain.access import audit, people, tokens
from registry.domain.access.audit import Act, Actor
from registry.domain.access.people import Person
from registry.domain.access.roles import Role, min_role
from registry.domain.access.tokens import FULL_SCOPE, SESSION, Caller
from registry.errors import NotAllowed, Unauthenticated

LIFETIME = timedelta(hours=12)
_KEPT = timedelta(days=30)
"""How long the row of a session stays after its end: its requests may still be waiting. The audit log names it
longer."""
_MAX_NAME = 100


def begin_with_token(session: Session, actor: Actor, text: str) -> tuple[Token, str]:
    """Begins a session with the token `text`. Returns it and its secret, which is not stored.

    Raises Unauthenticated for anything but a token in force, and NotAllowed for one of continuous integration.
    """
    parent = session.get_one(Token, tokens.authenticate(session, text, actor.at).token_id)
    if parent.publisher_id is not None:
        raise NotAllowed(
            "token_not_allowed",
            "A job of continuous integration does not sign in to pages.",
            subject=parent.user,
            next_step="Sign in with a token of your own.",
        )
    tokens.record_use(session, parent.id, actor.at)
    return _begin(session, replace(actor, name=parent.user, token_id=parent.id), parent, {})


def begin_with_roles(session: Session, actor: Actor, person: Person, roles: Mapping[str, Role]) -> tuple[Token, str]:
    """Begins a session of a person whom a provider vouches for, with the roles granted by the provider in addition to
    the person's own. Earlier sessions lose the roles that the provider no longer grants. Returns the session and its
    secret, which is not stored.
    Raises what `people.user_of` raises."""
    user = people.user_of(session, person)
    earlier = select(Token).where(Token.user == user, Token.session_roles.is_not(None))
    for row in session.scalars(earlier.with_for_update()):
        kept = (row.session_roles or {}).items()
        row.session_roles = {name: min_role(role, roles[name]).value for name, role in kept if name in roles}
    return _begin(session, replace(actor, name=user), None, roles)


def authenticate(session: Session, text: str, now: datetime) -> Caller:
    """The caller of a session. Raises Unauthenticated unless it and the token that it was begun with are in force."""
    try:
        row = tokens.find_secret(session, text, now, SESSION)
    except Unauthenticated as error:
        raise _ended() from error
    if row.parent_id is None:
        return tokens.caller_of(session, row, mints=True)
    parent = session.get(Token, row.parent_id)
    if parent is None or parent.revoked_at is not None:
        raise _ended()
    return tokens.caller_of(session, row, mints=tokens.mints(parent))


def end(session: Session, actor: Actor) -> None:
    """Ends the actor's session. Its jobs go on, which a revocation would stop."""
    row = session.get(Token, actor.token_id) if actor.token_id else None
    if row is None or not row.session:
        return
    row.expires_at = actor.at
    session.flush()
    audit.record(session, actor, Act.SESSION_END, f"token/{row.id}", namespace=None)


def end_of_person(session: Session, actor: Actor, issuer: str, subject: str) -> int:
    """Ends the sessions that the provider began for the person, and returns their number. Those begun with a token of
    this registry go on."""
    person = (ProviderUser.issuer == issuer) & (ProviderUser.subject == subject)
    begun = (Token.session, Token.parent_id.is_(None), Token.expires_at > actor.at)
    users = select(ProviderUser.user).where(person)
    rows = session.scalars(select(Token).where(Token.user.in_(users), *begun).with_for_update()).all()
    for row in rows:
        row.expires_at = actor.at
        audit.record(session, replace(actor, name=row.user), Act.SESSION_END, f"token/{row.id}", namespace=None)
    return len(rows)


def _begin(session: Session, actor: Actor, parent: Token | None, roles: Mapping[str, Role]) -> tuple[Token, str]:
    session.execute(delete(Token).where(Token.session, Token.expires_at < actor.at - _KEPT))
    token_id, sha256, text = tokens.new_secret(SESSION)
    until = actor.at + LIFETIME
    row = Token(
        id=token_id,
        user=actor.name,
        name=_name(actor.source),
        secret_sha256=sha256,
        scope=dict(parent.scope) if parent else dict(FULL_SCOPE),
        created_at=actor.at,
        created_by=actor.name,
        expires_at=min(until, parent.expires_at) if parent and parent.expires_at else until,
        revoked_at=None,
        publisher_id=None,
        last_used_at=None,
        session=True,
        parent_id=parent.id if parent else None,
        session_roles={namespace: role.value for namespace, role in roles.items()} or None,
    )
    session.add(row)
    session.flush()
    after = {"user": row.user, "expires_at": row.expires_at.isoformat() if row.expires_at else None}
    more = {"roles": row.session_roles} if row.session_roles else {}
    audit.record(session, actor, Act.SESSION_BEGIN, f"token/{row.id}", namespace=None, after={**after, **more})
    return row, text


def _name(source: str | None) -> str:
    """The address and the browser that began a session. Browsers may name themselves anything."""
    text = (source or "")[:_MAX_NAME]
    return "".join(character if character.isprintable() else "?" for character in text)


def _ended() -> Unauthenticated:
    return Unauthenticated("session_ended", "Your session has ended, or was revoked.")
