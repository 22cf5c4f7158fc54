"""Finds or creates repositories by name. Each holds releases of one kind."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from sqlalchemy import ColumnElement, select, tuple_
from sqlalchemy.orm import Session

from registry.database.engine import insert_if_absent
from registry.database.tables import Channel, Release, Repository
from registry.domain.access import audit, namespaces
from registry.domain.access.audit import Act, Actor
from registry.domain.access.roles import readable
from registry.errors import Conflict, NotFound
from registry.formats.references import MAX_NEAR, RepositoryName, is_version, refuse_git_name

_LISTED = 20
"""Maximum number of channels that an error lists."""


class Kind(StrEnum):
    """The kind of a repository's releases."""

    ADAPTER = "adapter"
    MODEL = "model"
    SET = "set"


def find(session: Session, name: RepositoryName, kind: Kind | None = None) -> Repository:
    """The repository. Raises NotFound, also for one of another kind."""
    repository = find_if_exists(session, name)
    if repository is None:
        raise unknown(str(name), kind)
    if kind and repository.kind != kind:
        message = f"{name} holds {repository.kind} releases, not {kind} releases."
        step = f"Name a repository with {kind} releases: `adaptory list --kind {kind}`."
        raise NotFound("repository_unknown", message, subject=str(name), next_step=step)
    return repository


def unknown(name: str, kind: Kind | None = None) -> NotFound:
    """The error for an unknown repository, or one of another kind."""
    return NotFound(
        "repository_unknown", f"The {kind or 'repository'} {name[:160]} does not exist.", subject=name[:160]
    )


def exists(session: Session, name: RepositoryName) -> bool:
    """Whether there is a repository of that name."""
    return find_if_exists(session, name) is not None


def beside(session: Session, actor: Actor, name: str) -> list[str]:
    """The readable repositories just before and after a name in sort order: there may be thousands."""
    namespace, own, key = Repository.namespace, Repository.name, tuple_(Repository.namespace, Repository.name)
    asked = tuple_(*name.partition("/")[::2])
    query = select(namespace, own).where(readable(actor, namespace))
    sides = (
        query.where(key < asked).order_by(namespace.desc(), own.desc()),
        query.where(key >= asked).order_by(namespace, own),
    )
    return [f"{row[0]}/{row[1]}" for side in sides for row in session.execute(side.limit(MAX_NEAR // 2))]


def unknown_channel(session: Session, repository: Repository, channel: str) -> NotFound:
    """The error for an unknown channel; it lists the existing ones."""
    query = select(Channel.name).where(Channel.repository_id == repository.id, Channel.move_id.is_not(None))
    there = list(session.scalars(query.order_by(Channel.name).limit(_LISTED)))
    full = f"{name_of(repository)}@{channel}"
    has = f"The channels of {name_of(repository)}: {', '.join(there)}." if there else "It has none yet."
    step = f"{has} To create it, promote a release with --to {channel}."
    if is_version(channel):
        step = f"{has} For the version, write {name_of(repository)}:{channel}."
    return NotFound("channel_unknown", f"The channel {full} does not exist.", subject=full, next_step=step)


def find_or_create(session: Session, actor: Actor, name: RepositoryName, kind: Kind) -> Repository:
    """The repository, created with its namespace if needed. Raises Conflict if it is of another kind."""
    repository = find_if_exists(session, name)
    if repository is None:
        refuse_git_name(name)
        _refuse_revision(session, name)
        namespaces.find_or_create(session, actor, name.namespace)
        values = {"namespace": name.namespace, "name": name.name, "kind": kind, "created_at": actor.at}
        if insert_if_absent(session, Repository, **values):
            after = {"kind": str(kind)}
            audit.record(session, actor, Act.REPOSITORY_CREATE, name, namespace=name.namespace, after=after)
        repository = find(session, name)
    of_repository = select(Release.id).where(Release.repository_id == repository.id).limit(1)
    if repository.kind != kind and session.scalar(of_repository) is None:
        repository.kind = kind  # created by a client of the Hugging Face Hub, before its first release
    _check_kind(repository, kind)
    return repository


def _refuse_revision(session: Session, name: RepositoryName) -> None:
    """Raises Conflict for a new repository whose name already stands for a revision of another, such as `sql.prod`."""
    for index in (index for index, character in enumerate(name.name) if character == "."):
        shorter, revision = RepositoryName(name.namespace, name.name[:index]), name.name[index + 1 :]
        repository = find_if_exists(session, shorter)
        if repository is not None and (is_version(revision) or has_channel(session, repository, revision)):
            raise Conflict(
                "name_is_revision",
                f"Clients that cannot name a revision use {name} for {shorter} at {revision}.",
                subject=str(name),
                next_step="Choose another name, such as one with '-' instead of the dot.",
            )


def refuse_shadowed(session: Session, name: RepositoryName, revision: str) -> None:
    """Raises Conflict for a new version or channel if a repository has the name that would stand for it."""
    for suffix in (revision, f"v{revision}") if is_version(revision) else (revision,):
        longer = RepositoryName(name.namespace, f"{name.name}.{suffix}")
        if exists(session, longer):
            raise Conflict(
                "revision_is_name",
                f"{name} cannot have {revision}: clients that cannot name a revision would confuse it with the "
                f"repository {longer}.",
                subject=str(longer),
            )


def has_channel(session: Session, repository: Repository, name: str) -> bool:
    """Whether the channel was ever moved."""
    query = select(Channel.id).where(Channel.repository_id == repository.id, Channel.name == name)
    return session.scalar(query.where(Channel.move_id.is_not(None))) is not None


def find_if_any(session: Session, name: RepositoryName, kind: Kind) -> Repository | None:
    """The repository, or None. Raises Conflict if it holds releases of another kind."""
    repository = find_if_exists(session, name)
    if repository is not None:
        _check_kind(repository, kind)
    return repository


def _check_kind(repository: Repository, kind: Kind) -> None:
    if repository.kind != kind:
        name = name_of(repository)
        raise Conflict(
            "kind_differs", f"{name} holds {repository.kind} releases, not {kind} releases.", subject=str(name)
        )


@dataclass(frozen=True, slots=True)
class RepositoryFilter:
    """Which repositories to list. All conditions must hold; None and () mean no condition.

    `words` are parts of NAMESPACE/NAME, in lower case. A repository matches a base or a licence (each in several
    spellings) if one of its releases that are not yanked does.
    """

    kinds: Sequence[Kind] = ()
    namespace: str | None = None
    words: Sequence[str] = ()
    base_digests: Sequence[str] = ()
    licenses: Sequence[Sequence[str]] = ()

    def conditions(self) -> list[ColumnElement[bool]]:
        full_name = Repository.namespace + "/" + Repository.name
        conditions = [full_name.contains(word, autoescape=True) for word in self.words]
        conditions += [Repository.kind == kind for kind in self.kinds]
        if self.namespace is not None:
            conditions.append(Repository.namespace == self.namespace)
        of_releases = [Release.base_digest == digest for digest in self.base_digests]
        of_releases += [Release.license.in_(names) for names in self.licenses]
        for condition in of_releases:
            live = select(Release.id).where(Release.repository_id == Repository.id, ~Release.yanked, condition)
            conditions.append(live.exists())
        return conditions


def list_page(session: Session, actor: Actor, wanted: RepositoryFilter, *, after: str, limit: int) -> list[Repository]:
    """The repositories that the actor may read, by full name; `after` is the last one of the previous page."""
    namespace, _, name = after.partition("/")
    key = tuple_(Repository.namespace, Repository.name)
    query = select(Repository).where(key > tuple_(namespace, name), readable(actor, Repository.namespace))
    query = query.where(*wanted.conditions()).order_by(Repository.namespace, Repository.name)
    return list(session.scalars(query.limit(limit)))


def name_of(repository: Repository) -> RepositoryName:
    return RepositoryName(repository.namespace, repository.name)


def find_if_exists(session: Session, name: RepositoryName) -> Repository | None:
    """The repository, or None."""
    return session.scalar(
        select(Repository).where(Repository.namespace == name.namespace, Repository.name == name.name)
    )


def lock(session: Session, repository_id: int) -> None:
    """Locks the repository: serializes pushes, yanks and channel creation until the transaction ends."""
    session.execute(select(Repository.id).where(Repository.id == repository_id).with_for_update(key_share=True))
