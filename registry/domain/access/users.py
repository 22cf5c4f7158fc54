"""Removes a person's name. Records of their acts stay, under a pseudonym; tokens, sessions and roles end."""

import json
from dataclasses import dataclass
from secrets import token_hex
from typing import Any
from typing import cast as cast_to

from sqlalchemy import Text, cast, delete, or_, select, update
from sqlalchemy.orm import Session

from registry.database.engine import Row
from registry.database.tables import (
    Approval,
    AuditRow,
    Base,
    Canary,
    CanaryFigures,
    ChangeRequest,
    Commit,
    Job,
    KeptAnswer,
    Member,
    Move,
    Namespace,
    PolicyException,
    Promotion,
    ProviderUser,
    Release,
    Score,
    Signature,
    SuiteMetric,
    SuiteVersion,
    Token,
    TrustedPublisher,
    Upload,
    Webhook,
    WorkerKey,
    XetUpload,
)
from registry.domain.access import audit, audit_chain
from registry.domain.access.audit import Act, Actor
from registry.errors import NotFound, Usage

PSEUDONYM = "removed-user-"
_UNTRACKED = {"synchronize_session": False}
RENAMED: tuple[tuple[type[Row], str], ...] = (
    (AuditRow, "actor"), (Base, "created_by"), (Job, "created_by"), (Namespace, "created_by"), (SuiteMetric, "by"),
    (SuiteVersion, "created_by"), (Token, "user"), (Token, "created_by"), (TrustedPublisher, "created_by"),
    (Upload, "created_by"), (XetUpload, "created_by"), (Commit, "author"), (Release, "created_by"),
    (Approval, "user"), (Move, "actor"), (Score, "measured_by"), (Signature, "created_by"), (Promotion, "actor"),
    (Webhook, "created_by"),
    (PolicyException, "created_by"), (WorkerKey, "revoked_by"), (Canary, "actor"), (CanaryFigures, "reporter"),
    (ChangeRequest, "actor"), (ChangeRequest, "ended_by"),
)  # fmt: skip
"""Every column with a user's name is here or in `ENDED`, whose rows are deleted."""
ENDED: tuple[tuple[type[Row], str], ...] = ((Member, "user"), (KeptAnswer, "user"), (ProviderUser, "user"))


@dataclass(frozen=True, slots=True)
class RemovedUser:
    """The pseudonym that took the name's place, and in how many rows."""

    user: str
    rows: int


def remove(session: Session, actor: Actor, user: str) -> RemovedUser:
    """Replaces a user's name by a pseudonym, also in the audit log, and ends the user's tokens, sessions and roles.
    Free text, such as reasons and notes, is not searched. Raises NotFound for a name that does not occur.
    """
    if user == actor.name:
        raise Usage("own_name", f"{user} cannot remove their own name.", subject=user)
    pseudonym = PSEUDONYM + token_hex(4)
    ended = update(Token).where(Token.user == user, Token.revoked_at.is_(None)).values(revoked_at=actor.at)
    session.execute(ended, execution_options=_UNTRACKED)
    session.execute(update(Token).where(Token.user == user).values(name=""), execution_options=_UNTRACKED)
    own = update(AuditRow).where(AuditRow.actor == user).values(source=None).returning(AuditRow.id)
    rewritten = set(session.scalars(own, execution_options=_UNTRACKED))
    about = _rename_in_audit(session, user, pseudonym)
    rows = len(about) + _end_changes(session, actor, user, pseudonym)
    for table, name in ENDED:
        column = getattr(table, name)
        gone = delete(table).where(column == user).returning(column)
        rows += len(session.execute(gone, execution_options=_UNTRACKED).all())
    for table, name in RENAMED:
        column = getattr(table, name)
        renamed = update(table).where(column == user).values({name: pseudonym}).returning(column)
        rows += len(session.execute(renamed, execution_options=_UNTRACKED).all())
    if not rows:
        raise NotFound("user_unknown", f"The name {user} does not occur anywhere.", subject=user)
    session.expire_all()
    sealed = audit_chain.sealed_among(session, rewritten.union(about))
    removal = audit.record(
        session, actor, Act.USER_REMOVE, pseudonym, namespace=None, after={"rows": rows}, resealed=len(sealed)
    )
    audit_chain.seal_rewritten(session, sealed, removal)
    return RemovedUser(pseudonym, rows)


def _rename_in_audit(session: Session, user: str, pseudonym: str) -> list[int]:
    """Renames the user in audit rows: the subject of a membership, and values that are the name. Returns their ids."""
    member = f"/members/{user}"
    quoted = json.dumps(user)
    names = [cast(column, Text).contains(quoted, autoescape=True) for column in _DOCUMENTS]
    about = select(AuditRow).where(or_(AuditRow.subject.endswith(member, autoescape=True), *names))
    rows = session.scalars(about).all()
    for row in rows:
        if row.subject.endswith(member):
            row.subject = row.subject.removesuffix(user) + pseudonym
        for column in _DOCUMENTS:
            setattr(row, column.key, _replaced(getattr(row, column.key), user, pseudonym))
    session.flush()
    return [row.id for row in rows]


def _end_changes(session: Session, actor: Actor, user: str, pseudonym: str) -> int:
    """Cancels the requests by the user or about the user that wait for a second admin, and renames the user in all of
    them. Returns how many are about the user."""
    columns = (ChangeRequest.change, ChangeRequest.before, ChangeRequest.after, ChangeRequest.error)
    naming = or_(*(cast(column, Text).contains(json.dumps(user), autoescape=True) for column in columns))
    rows = session.scalars(select(ChangeRequest).where(or_(ChangeRequest.actor == user, naming)).with_for_update())
    about = 0
    for row in rows.all():
        if row.state == "pending":
            row.state, row.ended_at, row.ended_by = "cancelled", actor.at, actor.name
        documents = {column.key: getattr(row, column.key) for column in columns}
        renamed = _replaced(documents, user, pseudonym)
        about += renamed != documents
        for name, value in renamed.items():
            setattr(row, name, value)
    session.flush()
    return about


_DOCUMENTS = (AuditRow.before, AuditRow.after, AuditRow.detail)


def _replaced(value: Any, old: str, new: str) -> Any:
    """A JSON value with each string that is `old` replaced."""
    if isinstance(value, dict):
        return {key: _replaced(item, old, new) for key, item in cast_to("dict[str, Any]", value).items()}
    if isinstance(value, list):
        return [_replaced(item, old, new) for item in cast_to("list[Any]", value)]
    return new if value == old else value
