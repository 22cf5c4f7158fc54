"""Commits to a repository: sets of files that may become releases.

They are `main`, or drafts on `next` in a namespace whose `main` serves releases alone.

A commit id is the digest of the files alone, so repeating a commit has the same result. Commits of one repository wait
for each other. gc keeps the files of every commit, since they are files of a revision, until `forget` removes it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from sqlalchemy import ColumnElement, Select, delete, exists, select
from sqlalchemy.orm import Session, aliased

from registry.database.locks import lock_blobs_exclusive
from registry.database.tables import Blob, Commit, Release, Repository, Revision, RevisionFile
from registry.domain.access import audit
from registry.domain.access.audit import Act, Actor
from registry.domain.access.roles import Role, permit
from registry.domain.catalog import releases, repositories
from registry.domain.catalog.releases import NewRelease
from registry.domain.catalog.repositories import Kind
from registry.errors import NotFound, Stale
from registry.formats.manifest import (
    ManifestFile,
    canonical_manifest,
    check_path,
    commit_id,
    parse_manifest,
    refuse_hidden,
    refuse_unportable,
)
from registry.formats.pickles import refuse_pickle_name
from registry.formats.references import Digest, RepositoryName

EMPTY_MANIFEST = '{"files":[]}'
EMPTY = commit_id(EMPTY_MANIFEST.encode())
"""The commit id of a repository without files."""
MAX_TITLE = 400


@dataclass(frozen=True, slots=True)
class Addition:
    """A file whose bytes the namespace holds. `size_bytes` is None if the client does not state it."""

    path: str
    sha256: Digest
    size_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Deletion:
    """A file, or with `folder` all files below a path."""

    path: str
    folder: bool = False


@dataclass(frozen=True, slots=True)
class CommitChange:
    """The operations of a commit, in order. With a `parent` (7 digits or more), it applies only to that commit."""

    title: str
    message: str = ""
    parent: str | None = None
    operations: Sequence[Addition | Deletion] = field(default=())


def create_repository(session: Session, actor: Actor, name: RepositoryName) -> bool:
    """Creates an empty repository. Returns whether it is new. Its kind is that of its first release."""
    permit(actor, Role.PUBLISHER, str(name))
    if repositories.exists(session, name):
        return False
    repositories.find_or_create(session, actor, name, Kind.ADAPTER)
    return True


def has_commits(session: Session, repository: Repository) -> bool:
    return session.scalar(select(Commit.id).where(Commit.repository_id == repository.id).limit(1)) is not None


def head(session: Session, repository: Repository) -> Revision | None:
    """The files that a commit changes: those of the last commit or, before the first one, of the newest release. A
    commit does not count while all its releases are yanked, or if its files were taken down."""
    query = select(Commit).where(Commit.repository_id == repository.id, _is_servable(Commit))
    commit = session.scalar(query.order_by(Commit.id.desc()).limit(1))
    if commit is not None:
        return commit.revision
    order = (Release.stable.desc(), Release.sort_key.desc())
    newest = select(Release).where(Release.repository_id == repository.id, ~Release.yanked).order_by(*order).limit(1)
    release = session.scalar(newest)
    return release.revision if release else None


def _is_servable(commit: type[Commit]) -> ColumnElement[bool]:
    """A SQL condition: the commit was not taken down, and not released and yanked."""
    release, revision = aliased(Release), aliased(Revision)
    released = exists().where(release.revision_id == commit.revision_id)
    gone = exists().where(revision.id == commit.revision_id, revision.taken_down_at.is_not(None))
    return ~gone & (~released.where(release.yanked) | released.where(~release.yanked))


def files_after(session: Session, name: RepositoryName, change: CommitChange) -> list[ManifestFile]:
    """The files of `main` after a change. Raises as `append`."""
    return _plan(session, repositories.find(session, name), change).files


def append(
    session: Session, actor: Actor, name: RepositoryName, change: CommitChange, checked: Sequence[ManifestFile]
) -> str | None:
    """Applies a change to `main` and returns the new commit id; None if the result differs from the files that the
    caller has checked, since `main` has moved. Returns the head's id, and records nothing, if the head has the
    resulting files already: a client that lost the answer sends a commit again.

    Raises Stale if `main` has moved past the parent.
    """
    permit(actor, Role.PUBLISHER, str(name))
    repository = repositories.find(session, name)
    repositories.lock(session, repository.id)
    plan = _plan(session, repository, change)
    if set(plan.files) != set(checked):
        return None
    if plan.unchanged is not None:
        return plan.unchanged
    revision = releases.find_or_create_revision(session, actor, repository, plan.files)
    _record(session, actor, repository, revision, (change.title, change.message))
    return revision.commit


@dataclass(frozen=True, slots=True)
class _CommitPlan:
    """The files that a change leaves, and the head's id if it has them already."""

    files: list[ManifestFile]
    unchanged: str | None = None


def _plan(session: Session, repository: Repository, change: CommitChange) -> _CommitPlan:
    current = head(session, repository)
    at = current.commit if current else EMPTY
    is_parent = change.parent is None or at.startswith(change.parent)
    start = current if is_parent else find_revision(session, repository, change.parent or "")
    files = _applied(session, parse_manifest(start.manifest) if start else [], change.operations)
    if files and commit_id(canonical_manifest(files)) == at:
        return _CommitPlan(files, at)
    if not is_parent:
        raise Stale(
            "head_moved",
            f"main of {repositories.name_of(repository)} is at {at}, not at {change.parent}.",
            subject=str(repositories.name_of(repository)),
        )
    return _CommitPlan(files, EMPTY if not change.operations and current is None else None)


def added_files(session: Session, change: CommitChange) -> list[ManifestFile]:
    """The files that a change adds, with the sizes that the client states, or those of the blobs."""
    added = [addition for addition in change.operations if isinstance(addition, Addition)]
    sizes = _sizes(session, [addition.sha256 for addition in added])
    return [_file(addition, sizes) for addition in added]


def _file(added: Addition, sizes: Mapping[str, int]) -> ManifestFile:
    size = sizes.get(added.sha256, 0) if added.size_bytes is None else added.size_bytes
    return ManifestFile(added.path, size, added.sha256)


def publish(session: Session, actor: Actor, new: NewRelease, *, moves_main: bool = True) -> tuple[Release, bool]:
    """Publishes like `releases.publish`; in a repository with commits, a release whose files are not those of a commit
    becomes the head of `main`, if it `moves_main`."""
    release, created = releases.publish(session, actor, new)
    if created and moves_main and has_commits(session, release.repository):
        made_from = select(Commit.id).where(Commit.revision_id == release.revision_id).limit(1)
        if session.scalar(made_from) is None:
            _record(session, actor, release.repository, release.revision, (release.version, release.notes))
    return release, created


def _record(session: Session, actor: Actor, repository: Repository, revision: Revision, text: tuple[str, str]) -> None:
    title, message = text
    values = {"title": title[:MAX_TITLE], "message": message, "author": actor.name, "created_at": actor.at}
    session.add(Commit(repository_id=repository.id, revision_id=revision.id, revision=revision, **values))
    session.flush()
    name = repositories.name_of(repository)
    after = {"commit": revision.commit}
    audit.record(session, actor, Act.REPOSITORY_COMMIT, name, namespace=repository.namespace, after=after)


def forgettable(before: datetime) -> Select[int]:
    """The ids of the revisions that no release names and that were followed by another commit before that time, each
    time they were the head. The head of a repository is never among them."""
    later = aliased(Commit)
    followed = exists().where(
        later.repository_id == Commit.repository_id,
        later.id > Commit.id,
        later.created_at < before,
        _is_servable(later),
    )
    committed = exists().where(Commit.revision_id == Revision.id)
    return select(Revision.id).where(
        committed,
        ~committed.where(~followed),
        ~exists().where(Release.revision_id == Revision.id),
    )


def forget(session: Session, operator: Actor, before: datetime, limit: int) -> int:
    """Removes up to `limit` forgettable revisions with their commits, and returns their number. Blobs that nothing else
    names are unused afterwards. Locks ensure that no revision is published or committed meanwhile."""
    lock_blobs_exclusive(session)
    query = select(Revision.id, Revision.commit, Repository.namespace, Repository.name)
    query = query.join(Repository, Repository.id == Revision.repository_id).where(Revision.id.in_(forgettable(before)))
    rows = session.execute(query.order_by(Revision.id).limit(limit)).all()
    ids = [row.id for row in rows]
    for removal in (
        delete(Commit).where(Commit.revision_id.in_(ids)),
        delete(RevisionFile).where(RevisionFile.revision_id.in_(ids)),
        delete(Revision).where(Revision.id.in_(ids)),
    ):
        session.execute(removal, execution_options={"synchronize_session": False})
    for row in rows:
        subject = RepositoryName(row.namespace, row.name)
        gone = {"commit": row.commit}
        audit.record(session, operator, Act.REPOSITORY_FORGET, subject, namespace=row.namespace, before=gone)
    return len(rows)


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """A commit or a release, as an entry of a repository's history."""

    commit: str
    title: str
    message: str
    author: str
    created_at: datetime


def list_history(session: Session, name: RepositoryName, last: str, *, drafts: bool = True) -> list[HistoryEntry]:
    """The commits and the releases up to the commit `last`, newest first; a release that is also a commit appears once.
    Without `drafts`, only commits that were released."""
    columns = (Revision.commit, Commit.title, Commit.message, Commit.author, Commit.created_at)
    query = select(*columns).join(Revision, Revision.id == Commit.revision_id)
    query = query.join(Repository, Repository.id == Commit.repository_id).order_by(Commit.id.desc())
    query = query.where(Repository.namespace == name.namespace, Repository.name == name.name)
    committed = [HistoryEntry(*row) for row in session.execute(query)]
    listed = releases.list_history(session, name)
    if not drafts:
        published = {release.commit for release in listed}
        committed = [entry for entry in committed if entry.commit in published]
    known = {entry.commit for entry in committed}
    released = [
        HistoryEntry(release.commit, release.version, release.notes, release.created_by, release.created_at)
        for release in listed
        if release.commit not in known
    ]
    entries = sorted([*committed, *released], key=lambda entry: entry.created_at, reverse=True)
    first = next((index for index, entry in enumerate(entries) if entry.commit == last), len(entries))
    return entries[first:]


def find_revision(session: Session, repository: Repository, digits: str) -> Revision | None:
    """The revision of a commit or a release, by at least 7 digits of its id."""
    between = Revision.commit.between(digits, digits.ljust(40, "g"))
    rows = session.scalars(select(Revision).where(Revision.repository_id == repository.id, between).limit(2)).all()
    return rows[0] if len(rows) == 1 else None


def _applied(
    session: Session, before: Sequence[ManifestFile], operations: Sequence[Addition | Deletion]
) -> list[ManifestFile]:
    """The files after the operations. Raises Invalid for a name that a release cannot have, and NotFound for the
    deletion of an absent file."""
    files = {file.path: file for file in before}
    sizes = _sizes(session, [addition.sha256 for addition in operations if isinstance(addition, Addition)])
    for operation in operations:
        if isinstance(operation, Addition):
            refuse_name(operation.path)
            files[operation.path] = _file(operation, sizes)
        else:
            prefix = operation.path.rstrip("/") + "/"
            gone = [path for path in files if path == operation.path or (operation.folder and path.startswith(prefix))]
            if not gone:
                raise NotFound(
                    "file_unknown",
                    f"A file with this name doesn't exist: {operation.path[:200]}.",
                    subject=operation.path[:200],
                    next_step="List the files of main.",
                )
            for path in gone:
                del files[path]
    return list(files.values())


def refuse_name(path: str) -> None:
    """Raises Invalid for the name of a file that a release cannot have."""
    check_path(path)
    refuse_hidden(path)
    refuse_unportable(path)
    refuse_pickle_name(path)


def _sizes(session: Session, digests: Sequence[str]) -> Mapping[str, int]:
    rows = session.execute(select(Blob.sha256, Blob.size_bytes).where(Blob.sha256.in_(digests)))
    return dict(rows.all())
