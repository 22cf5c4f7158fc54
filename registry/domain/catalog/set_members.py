"""Members of sets that are withdrawn: what sets lose by it, and what their readers are warned of."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, or_, select
from sqlalchemy.orm import Session, aliased

from registry.database.tables import Canary, Channel, Release, ReleaseInput, Repository
from registry.database.tables.fleet import RUNNING
from registry.domain.access.audit import Actor
from registry.domain.access.roles import readable
from registry.domain.catalog.releases import full_name
from registry.domain.catalog.repositories import Kind
from registry.errors import Refused


@dataclass(frozen=True, slots=True)
class ServingSet:
    """A set that has a release as a member, and the channels that serve it or try it as a canary."""

    release: str
    channels: tuple[str, ...]


def sets_with(session: Session, actor: Actor, release: Release, *, same_files: bool = False) -> list[ServingSet]:
    """The sets with the release as a member that are not yanked and that the actor may read; with `same_files`, also
    those with another version of its files."""
    member = aliased(Release)
    having = (
        select(ReleaseInput.release_id)
        .join(member, member.id == ReleaseInput.input_id)
        .where(member.revision_id == release.revision_id if same_files else member.id == release.id)
    )
    query = (
        select(Release)
        .join(Repository, Repository.id == Release.repository_id)
        .where(Release.id.in_(having), Repository.kind == Kind.SET, ~Release.yanked)
        .where(readable(actor, Repository.namespace))
        .order_by(Release.id)
    )
    return [ServingSet(full_name(row), tuple(_channels(session, row))) for row in session.scalars(query)]


def warnings(session: Session, set_id: int) -> list[str]:
    """A sentence for each member of a set that is yanked or taken down. The set's file names it to every reader, and
    the reason is not for all of them."""
    members = select(Release).join(ReleaseInput, ReleaseInput.input_id == Release.id)
    members = members.where(ReleaseInput.release_id == set_id, Release.yanked).order_by(Release.id)
    return [f"It serves {full_name(row)}, which {_state(row)}." for row in session.scalars(members)]


def lacks_member() -> ColumnElement[bool]:
    """Whether a release is a set with a member that is yanked or taken down."""
    member = aliased(Release)
    withdrawn = select(ReleaseInput.release_id).join(member, member.id == ReleaseInput.input_id)
    sets = select(Repository.id).where(Repository.id == Release.repository_id, Repository.kind == Kind.SET).exists()
    return withdrawn.where(ReleaseInput.release_id == Release.id, member.yanked).exists() & sets


def refuse_withdrawn(session: Session, set_id: int, subject: str, what: str = "promoted") -> None:
    """Raises Refused for a set with a member that is yanked or taken down; `what` cannot be done with it."""
    if withdrawn := warnings(session, set_id):
        message = f"{subject} cannot be {what}. {' '.join(withdrawn)}"
        raise Refused("member_withdrawn", message, subject=subject)


def _state(member: Release) -> str:
    return "is yanked" if member.revision.taken_down_at is None else "was taken down"


def _channels(session: Session, release: Release) -> Sequence[str]:
    trying = select(Canary.channel_id).where(Canary.release_id == release.id, Canary.state == RUNNING)
    serving = or_(Channel.served_id == release.id, Channel.id.in_(trying))
    query = select(Channel.name).where(Channel.repository_id == release.repository_id, serving)
    return session.scalars(query.order_by(Channel.name)).all()
