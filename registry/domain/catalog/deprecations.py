"""Deprecations of releases: a reason and perhaps a successor, shown wherever the release is. They block nothing."""

from sqlalchemy.orm import Session

from registry.database.tables import Release
from registry.domain.access import audit
from registry.domain.access.audit import Act, Actor
from registry.domain.access.roles import Role, permit
from registry.domain.catalog import releases, repositories
from registry.domain.catalog.bases import own_successor
from registry.domain.catalog.releases import full_name
from registry.formats.references import parse_reference


def deprecate(session: Session, actor: Actor, release: Release, reason: str | None, successor: str | None) -> Release:
    """Deprecates a release; None as the reason undoes it, and the same again changes nothing.

    Raises NotFound for a successor that does not exist, or that the actor may not read.
    """
    follower = _successor(session, actor, release, successor) if successor and reason is not None else None
    repositories.lock(session, release.repository_id)  # so that the audit's `before` is right
    session.refresh(release, ["deprecated_reason", "successor"])
    before = {"deprecated": release.deprecated_reason, "successor": release.successor}
    after = {"deprecated": reason, "successor": follower}
    if before != after:
        release.deprecated_reason, release.successor = reason, follower
        session.flush()
        audit.record(
            session,
            actor,
            Act.RELEASE_DEPRECATE,
            full_name(release),
            namespace=release.repository.namespace,
            reason=reason,
            before=before,
            after=after,
        )
    return release


def _successor(session: Session, actor: Actor, release: Release, text: str) -> str:
    """The reference to a release or a repository, which exists."""
    reference = parse_reference(text)
    permit(actor, Role.READER, reference.repository.namespace)
    if reference.version is not None:
        follower = releases.find(session, reference.repository, reference.version)
        if follower.id == release.id:
            raise own_successor(full_name(release))
    else:
        repositories.find(session, reference.repository)
    return str(reference)
