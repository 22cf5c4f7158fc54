"""Lineage downwards: the releases that a release went into."""

from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry.database.tables import Release, ReleaseInput, Repository, Revision
from registry.domain.access.audit import Actor
from registry.domain.access.roles import readable


@dataclass(frozen=True, slots=True, kw_only=True)
class Descendant:
    """A release that another one went into with this weight."""

    id: int
    repository: str
    kind: str
    version: str
    commit: str
    weight: float


def descendants(session: Session, actor: Actor, release: Release, *, before: int, limit: int) -> list[Descendant]:
    """The releases that have this one as an input and that the actor may read, newest first; `before` is the id of the
    last one of the previous page, 0 for the first page."""
    columns = (Repository.namespace, Repository.name, Repository.kind, Release.version, Revision.commit)
    query = (
        select(Release.id, *columns, ReleaseInput.weight)
        .join(ReleaseInput, ReleaseInput.release_id == Release.id)
        .join(Repository, Repository.id == Release.repository_id)
        .join(Revision, Revision.id == Release.revision_id)
        .where(ReleaseInput.input_id == release.id, readable(actor, Repository.namespace))
        .order_by(Release.id.desc())
        .limit(limit)
    )
    if before:
        query = query.where(Release.id < before)
    return [
        Descendant(
            id=number,
            repository=f"{namespace}/{name}",
            kind=kind,
            version=version,
            commit=commit,
            weight=weight,
        )
        for number, namespace, name, kind, version, commit, weight in session.execute(query)
    ]
