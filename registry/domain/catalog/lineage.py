"""Lineage: the releases that a release went into, and the composition whose weights a pushed release has."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sqlalchemy import ColumnElement, exists, false, func, or_, select, true
from sqlalchemy.orm import Session

from composer.findings import Finding, Severity
from composer.formats.adapters.facts import WEIGHTS_FILE
from registry.database.tables import Release, ReleaseInput, Repository, Revision, RevisionFile
from registry.domain.access.audit import Actor
from registry.domain.access.roles import EVERYWHERE, may_read, readable
from registry.domain.catalog.releases import Input, NewRelease, full_name
from registry.domain.catalog.repositories import Kind
from registry.formats.manifest import ManifestFile, parse_manifest

_WEIGHTS = ".safetensors"
_MAX_CANDIDATES = 20
_IS_COMPOSED = exists().where(ReleaseInput.release_id == Release.id, ReleaseInput.composition_id.is_not(None))


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


def inputs(session: Session, release: Release) -> list[Release]:
    """The releases that went into this one."""
    query = select(Release).join(ReleaseInput, ReleaseInput.input_id == Release.id)
    return list(session.scalars(query.where(ReleaseInput.release_id == release.id).order_by(Release.id)))


def with_inherited(session: Session, actor: Actor, new: NewRelease) -> tuple[NewRelease, list[Finding]]:
    """A pushed release with the inputs and the composition of an earlier one whose weights it has, if there is one that
    the actor may read, and a warning about it. Pushing the files of a composition again does not remove their licences
    and verdict."""
    source = _composed_with(session, actor, new) if not new.inputs else None
    if source is None:
        return new, []
    rows = session.scalars(select(ReleaseInput).where(ReleaseInput.release_id == source.id)).all()
    inputs = [Input(row.input_id, row.weight) for row in rows]
    composition_id = next((row.composition_id for row in rows if row.composition_id is not None), None)
    name = full_name(source) if may_read(actor, source.repository.namespace) else "a release out of this token's scope"
    message = f"These are the weights of {name}, which was composed: this release has its inputs and its verdict too."
    finding = Finding("composed_weights", Severity.WARNING, str(new.repository), message)
    return replace(new, inputs=inputs, composition_id=composition_id), [finding]


def _composed_with(session: Session, actor: Actor, new: NewRelease) -> Release | None:
    """The earliest composed release of the kind with exactly these weight files that the actor may read, with this
    token or another. Other files make no difference, nor does a takedown of its files since."""
    weights = _weights(new.kind, new.files)
    is_weight = func.lower(RevisionFile.path).endswith(_WEIGHTS)
    own = RevisionFile.revision_id == Release.revision_id
    query = (
        select(Release)
        .join(Repository, Repository.id == Release.repository_id)
        .where(Repository.kind == new.kind, _may_be_read(actor), _IS_COMPOSED)
        .order_by(Release.id)
    )
    there = query.where(
        Release.revision_id.in_(select(RevisionFile.revision_id).where(RevisionFile.sha256.in_(weights))),
        ~exists().where(own, is_weight, RevisionFile.sha256.not_in(weights)),
    )
    gone = query.join(Revision, Revision.id == Release.revision_id).where(Revision.taken_down_at.is_not(None))
    gone = gone.where(or_(false(), *(Revision.manifest.contains(sha256) for sha256 in weights)))
    candidates = [
        *session.scalars(there.limit(_MAX_CANDIDATES)),
        *(
            release
            for release in session.scalars(gone.limit(_MAX_CANDIDATES))
            if _made_of(release, new.kind) <= weights
        ),
    ]
    return next(
        (
            candidate
            for candidate in candidates
            if not _repeats_a_push(session, candidate, _made_of(candidate, new.kind))
        ),
        None,
    )


def _made_of(composed: Release, kind: Kind) -> set[str]:
    """The digests of its weights, even after its files were taken down."""
    return _weights(kind, parse_manifest(composed.revision.manifest))


def _repeats_a_push(session: Session, composed: Release, made_of: set[str]) -> bool:
    """Whether a release that was not composed had these weights before. Otherwise anyone could attach inputs to
    somebody's adapter: compose it alone, and wait for its author to push it again."""
    query = select(Release.id).join(RevisionFile, RevisionFile.revision_id == Release.revision_id)
    query = query.where(Release.id < composed.id, RevisionFile.sha256.in_(made_of), ~_IS_COMPOSED)
    query = query.group_by(Release.id).having(func.count(RevisionFile.sha256.distinct()) == len(made_of))
    return session.execute(query.limit(1)).first() is not None


def _weights(kind: Kind, files: Sequence[ManifestFile]) -> set[str]:
    """The digests of the files with weights: an adapter's single file, or all shards of a model."""
    if kind is Kind.ADAPTER:
        return {file.sha256 for file in files if file.path == WEIGHTS_FILE}
    return {file.sha256 for file in files if file.path.lower().endswith(_WEIGHTS)}


def _may_be_read(actor: Actor) -> ColumnElement[bool]:
    """A SQL condition: the user may read the repository. A token's narrower scope changes nothing; otherwise it could
    be used to shed the lineage."""
    if EVERYWHERE in actor.hidden:
        return true()
    return or_(readable(actor, Repository.namespace), Repository.namespace.in_(list(actor.hidden)))
