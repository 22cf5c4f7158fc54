"""Deletion of a channel that nobody follows, such as one with a misspelt name."""

from sqlalchemy.orm import Session

from registry.database.tables import Channel, Move, Repository
from registry.domain.access import audit
from registry.domain.access.audit import Act, Actor
from registry.domain.access.roles import Role, permit
from registry.domain.catalog import repositories
from registry.domain.channels import moves, pending, policies
from registry.errors import Refused, Usage
from registry.formats.references import Version


def delete(
    session: Session, actor: Actor, repository: Repository, name: str, *, serving: Version | None, reason: str
) -> str | None:
    """Deletes a channel; returns the version that it served. Its history stays and ends with the deletion. A channel of
    this name that is created later begins with nothing.

    Raises Refused for a channel with a policy, and for one that serves a release, unless an admin of its namespace
    names that release as `serving` and gives a reason.
    """
    session.scalar(moves.locked(repository, name))
    channel = moves.find(session, repository, name)
    subject = f"{repositories.name_of(repository)}@{name}"
    policy, _ = policies.find(session, repository, name)
    if not policies.is_empty(policy):
        raise Refused(
            "channel_has_policy",
            f"{subject} has a policy.",
            subject=subject,
            next_step=f"An admin removes it first: `adaptory policy set {subject} --clear`.",
        )
    served = moves.effective_move(session, channel)
    version = served.to_release.version if served else None
    if version is not None:
        _refuse_serving(actor, repository, subject, version, None if serving is None else str(serving), reason)
    _forget(session, actor, repository, channel, reason)
    return version


def _refuse_serving(
    actor: Actor, repository: Repository, subject: str, served: str, named: str | None, reason: str
) -> None:
    if served != named:
        raise Refused(
            "channel_serves",
            f"{subject} serves {served}.",
            subject=subject,
            next_step="Clients that follow it would find nothing. If there are none, an admin may delete it with "
            f"`adaptory channel delete {subject} --serving {served} --reason TEXT`.",
        )
    permit(actor, Role.ADMIN, repository.namespace)
    if not reason.strip():
        raise Usage("reason_missing", f"{subject} serves {served}: its deletion needs a reason.", subject=subject)


def _forget(session: Session, actor: Actor, repository: Repository, channel: Channel, reason: str) -> None:
    subject, last = f"{repositories.name_of(repository)}@{channel.name}", moves.current_of(session, channel)
    if waiting := pending.of_channel(session, channel.id):
        pending.end_moved(session, actor, waiting.id)
    left = last.to_release
    move = Move(
        channel_id=channel.id,
        kind=moves.DELETION,
        from_release_id=left.id,
        to_release_id=left.id,
        below_id=None,
        actor=actor.name,
        reason=reason,
        forced=False,
        gates=[],
        at=max(actor.at, last.at),
    )
    session.add(move)
    channel.move_id = channel.served_id = channel.served_key = None
    session.flush()
    audit.record(
        session,
        actor,
        Act.CHANNEL_DELETE,
        subject,
        namespace=repository.namespace,
        reason=reason,
        before={"move": last.id, "version": left.version, "commit": left.revision.commit},
        after={"move": move.id},
    )
