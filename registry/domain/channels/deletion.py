"""Deletion of a channel that has no followers, such as one with a misspelt name."""

from sqlalchemy.orm import Session

from registry.database.tables import Channel, Repository
from registry.domain.access.audit import Actor
from registry.domain.access.roles import Role, permit
from registry.domain.catalog import repositories
from registry.domain.channels import pending
from registry.domain.channels.policy import policies
from registry.domain.channels.serving import (
    DELETION,
    Entry,
    current_move,
    find_channel,
    locked_channel,
    record_entry,
    serving_move,
)
from registry.errors import Refused, Usage
from registry.formats.references import Version


def delete_channel(
    session: Session, actor: Actor, repository: Repository, name: str, *, serving: Version | None, reason: str
) -> str | None:
    """Deletes a channel; returns the version that it served. Its history stays and ends with the deletion. A channel
    created later under this name starts empty.

    Raises Refused for a channel with a policy, and for one that serves a release, unless an admin of its namespace
    names that release as `serving` and gives a reason.
    """
    session.scalar(locked_channel(repository, name))
    channel = find_channel(session, repository, name)
    subject = f"{repositories.name_of(repository)}@{name}"
    if not policies.is_empty(policies.find(session, policies.scope_of(repository, name)).policy):
        raise Refused(
            "channel_has_policy",
            f"{subject} has a policy.",
            subject=subject,
            next_step=f"An admin removes it first: `adaptory policy set {subject} --clear`.",
        )
    move = serving_move(session, channel)
    version = move.to_release.version if move else None
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
            next_step="Its followers would find nothing. If it has none, an admin may delete it with "
            f"`adaptory channel delete {subject} --serving {served} --reason TEXT`.",
        )
    permit(actor, Role.ADMIN, repository.namespace)
    if not reason.strip():
        raise Usage("reason_missing", f"{subject} serves {served}: its deletion needs a reason.", subject=subject)


def _forget(session: Session, actor: Actor, repository: Repository, channel: Channel, reason: str) -> None:
    last = current_move(session, channel)
    if waiting := pending.of_channel(session, channel.id):
        pending.end_moved(session, actor, waiting.id)
    pending.end_canary(session, channel.id, None, actor.at)
    channel.move_id = channel.served_id = channel.served_key = None
    subject = f"{repositories.name_of(repository)}@{channel.name}"
    record_entry(session, actor, subject, last, Entry(DELETION, reason, left=last.to_release))
