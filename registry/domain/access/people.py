"""People whom an OpenID provider vouches for. The provider identifies a person by a subject (`sub`) that never changes,
and so does the registry from the first sign-in on: a name that the provider later gives to somebody else does not
become theirs here."""

from dataclasses import dataclass

from sqlalchemy import exists, or_, select
from sqlalchemy.orm import Session

from registry.database.engine import insert_if_absent
from registry.database.tables import AuditRow, Member, ProviderUser, Token
from registry.domain.access import audit
from registry.domain.access.audit import Act, Actor
from registry.domain.access.roles import refuse_reserved
from registry.errors import Conflict, NotAllowed


@dataclass(frozen=True, slots=True)
class Person:
    """`name` is what the provider calls the person now."""

    issuer: str
    subject: str
    name: str


def user_of(session: Session, person: Person) -> str:
    """The person's user name here: that of the first sign-in, whatever the provider calls the person now.

    Raises Invalid for the reserved name, and NotAllowed for a name that belongs to another person of the provider, or
    to a user who existed here before, until an admin links the two.
    """
    refuse_reserved(person.name)
    own = (ProviderUser.issuer == person.issuer) & (ProviderUser.subject == person.subject)
    if (user := session.scalar(select(ProviderUser.user).where(own))) is not None:
        return user
    if session.get(ProviderUser, person.name) is None and not _is_local(session, person.name):
        given = {"user": person.name, "issuer": person.issuer, "subject": person.subject}
        insert_if_absent(session, ProviderUser, **given)
        if (user := session.scalar(select(ProviderUser.user).where(own))) is not None:
            return user
    raise NotAllowed(
        "name_taken",
        f"The name {person.name} belongs to another user here; the provider identifies you as {person.subject}.",
        subject=person.name,
        next_step=f"If both are you, ask an admin of the registry: `adaptory user link {person.name} "
        f"--subject {person.subject} --issuer {person.issuer}`.",
    )


def person_of(session: Session, user: str) -> ProviderUser | None:
    """The person of the provider who signs in as this user."""
    return session.get(ProviderUser, user)


def link(session: Session, actor: Actor, person: Person) -> None:
    """Makes the user of that name the provider's person, in place of another. Raises Conflict if the person has another
    user name here."""
    own = (ProviderUser.issuer == person.issuer) & (ProviderUser.subject == person.subject)
    other = session.scalar(select(ProviderUser.user).where(own, ProviderUser.user != person.name))
    if other is not None:
        raise Conflict(
            "subject_linked",
            f"{person.subject} of {person.issuer} is the user {other} already.",
            subject=other,
            next_step=f"Grant {other} the roles, or remove that name: `adaptory user remove`.",
        )
    refuse_reserved(person.name)
    row = session.get(ProviderUser, person.name, with_for_update=True)
    before = {"issuer": row.issuer, "subject": row.subject} if row else {}
    after = {"issuer": person.issuer, "subject": person.subject}
    if row is None:
        session.add(ProviderUser(user=person.name, **after))
    else:
        row.issuer, row.subject = person.issuer, person.subject
    session.flush()
    if before != after:
        audit.record(session, actor, Act.USER_LINK, f"user/{person.name}", namespace=None, before=before, after=after)


def _is_local(session: Session, name: str) -> bool:
    """Whether the name belonged to a local user before any sign-in through a provider: it has a role or a token, or has
    acted. Sign-ins before migration 0022 are known too: a user that began with one belongs to the provider.
    """
    signed_in = (AuditRow.actor == name) & (AuditRow.act == Act.SESSION_BEGIN) & AuditRow.token_id.is_(None)
    first = session.execute(select(AuditRow.id, AuditRow.at).where(signed_in).order_by(AuditRow.id).limit(1)).first()
    named = or_(
        AuditRow.actor == name,
        (AuditRow.act == Act.MEMBER_SET) & AuditRow.subject.endswith(f"/members/{name}", autoescape=True),
    )
    if first is None:
        own = or_(exists().where(Member.user == name), exists().where(Token.user == name), exists().where(named))
        return bool(session.scalar(select(own)))
    made = exists().where(Token.user == name, ~Token.session, Token.created_at < first.at)
    return bool(session.scalar(select(or_(made, exists().where(named, AuditRow.id < first.id)))))
