"""What waits for a person: promotions, and changes that need a second admin."""

from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry.database.tables import ChangeRequest, Promotion, Release, Repository
from registry.domain.access.audit import Actor
from registry.domain.access.roles import Role, granted, holds
from registry.domain.catalog import repositories
from registry.domain.changes import kinds, requests
from registry.domain.channels.pending import PENDING
from registry.domain.channels.policy import policies
from registry.domain.channels.serving import unspent_approvals
from registry.wire.changes import InboxItem


class Inbox(NamedTuple):
    """What waits, the first to expire first; `more` if that is not all."""

    items: Sequence[InboxItem]
    more: bool


def waiting(session: Session, actor: Actor, limit: int) -> Inbox:
    """The promotions that wait where the actor is a member, and the changes where the actor is an admin."""
    items = [*_promotions(session, actor, limit + 1), *_changes(session, actor, limit + 1)]
    items.sort(key=lambda item: item.expires_at)
    return Inbox(items[:limit], len(items) > limit)


def _promotions(session: Session, actor: Actor, limit: int) -> list[InboxItem]:
    readable = granted(actor, Role.READER).within(Repository.namespace)
    query = select(Promotion).join(Release, Release.id == Promotion.release_id)
    query = query.join(Repository, Repository.id == Release.repository_id)
    query = query.where(Promotion.state == PENDING, Promotion.expires_at > actor.at, readable)
    rows = session.scalars(query.order_by(Promotion.expires_at, Promotion.id).limit(limit)).unique()
    return [_promotion(session, actor, row) for row in rows]


def _promotion(session: Session, actor: Actor, row: Promotion) -> InboxItem:
    repository = row.release.repository
    lacking = [gate for gate in row.gates if gate.get("waiting")]
    return InboxItem(
        kind="promotion",
        id=row.id,
        namespace=repository.namespace,
        subject=f"{repositories.name_of(repository)}@{row.channel.name}",
        summary=f"promote {row.release.version}",
        waits_for=[f"{gate['rule']}: {gate['detail']}" for gate in lacking],
        actor=row.actor,
        for_you=_may_approve(session, actor, row),
        created_at=row.created_at,
        expires_at=row.expires_at,
    )


def _may_approve(session: Session, actor: Actor, row: Promotion) -> bool:
    """Whether the promotion lacks an approval that the actor may give."""
    repository, channel = row.release.repository, row.channel
    role = policies.approver(policies.in_force(session, repository, channel.name, actor.at))
    if role is None or row.actor == actor.name or not holds(actor, role, repository.namespace):
        return False
    return actor.name not in {approval.user for approval in unspent_approvals(session, row.release, channel.name)}


def _changes(session: Session, actor: Actor, limit: int) -> list[InboxItem]:
    query = select(ChangeRequest).where(ChangeRequest.state == PENDING, ChangeRequest.expires_at > actor.at)
    query = query.where(granted(actor, Role.ADMIN).within(ChangeRequest.namespace))
    rows = session.scalars(query.order_by(ChangeRequest.expires_at, ChangeRequest.id).limit(limit))
    return [
        InboxItem(
            kind="change",
            id=row.id,
            namespace=row.namespace,
            subject=f"{row.namespace}/changes/{row.id}",
            summary=kinds.summary(row.namespace, requests.change_of(row)),
            waits_for=["approval by a second admin"],
            actor=row.actor,
            for_you=row.actor != actor.name,
            created_at=row.created_at,
            expires_at=row.expires_at,
        )
        for row in rows
    ]
