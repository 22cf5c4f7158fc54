"""Revisions as clients of the Hugging Face Hub name them.

A revision is `main`, a version with or without `v`, a channel, or a commit. `main` is the last commit, or the newest
release. Programs that cannot name a revision write it behind the repository: `acme/sql.prod`, `acme/sql.v1.2.0`.

In a namespace whose `main` serves releases alone, commits are drafts: publishers find them by their ids, and the last
one as `next`. For everybody else, drafts do not exist.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry.database.tables import Release, Repository
from registry.domain.access import namespaces
from registry.domain.access.audit import Actor
from registry.domain.access.roles import Role, holds
from registry.domain.catalog import commits, releases, repositories, signatures
from registry.domain.channels import resolve
from registry.domain.channels.resolve import ResolvedRow
from registry.errors import NotFound, Usage
from registry.formats.references import Reference, RepositoryName, Version, parse_reference, parse_version

MAIN = "main"
NEXT = "next"
COMMIT_DIGITS = 40
_LISTED = 5
"""Maximum number of channels and of versions that an error lists."""


@dataclass(frozen=True, slots=True)
class Refs:
    """The commits behind a repository's names: `main` if it has a release, channels, and versions; `drafts` if
    the actor sees any."""

    main: str | None
    drafts: str | None
    channels: dict[str, str]
    versions: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    """The files at a revision. `release_id` is None if they are not released, and `full_name` is for messages."""

    repository: RepositoryName
    revision_id: int
    commit: str
    manifest: str
    full_name: str
    release_id: int | None = None
    warning: str = ""


def locate(session: Session, actor: Actor, named: str, revision: str) -> Located:
    """The files at a revision of the repository `named`, or of the repository that `named` is an alias in. Raises
    NotFound.

    A repository of exactly that name comes first. With an alias, `main` is the revision that the alias names.
    """
    for repository, suffix in _readings(named):
        if not suffix:
            if row := _at(session, actor, repository, revision):
                return row
            if repositories.exists(session, repository):
                raise _unknown(session, actor, repository, revision)
        elif row := _pinned(session, repository, suffix):
            row = row if revision == MAIN else _at(session, actor, repository, revision)
            if row is None:
                raise _unknown(session, actor, repository, revision)
            return row
    raise repositories.unknown(named)


def start_of_commit(session: Session, repository: RepositoryName) -> Located:
    """The files that a commit changes: none in a repository whose releases are all yanked or taken down. Raises
    NotFound for an unknown repository."""
    repositories.find(session, repository)
    return _head(session, repository) or _empty(repository)


def to_release(session: Session, actor: Actor, repository: RepositoryName, revision: str) -> Located:
    """The files that a tag at a revision publishes; clients send `main`, the last commit, if the user names no
    revision."""
    if revision == MAIN and (located := _head(session, repository)):
        return located
    return locate(session, actor, str(repository), revision)


def refuse_no_branch(session: Session, repository: RepositoryName, revision: str) -> None:
    """Raises Usage for a commit to anything but `main`, or `next` where commits are drafts."""
    if revision == MAIN or (revision == NEXT and namespaces.has_drafts(session, repository.namespace)):
        return
    raise Usage(
        "not_main",
        f"Commits go to main, not to {revision[:80]!r}.",
        subject=revision[:80],
        next_step="Commit to main and tag a version; a channel moves by `adaptory promote`.",
    )


def released_version(session: Session, actor: Actor, repository: RepositoryName, revision: str) -> Version:
    """The version of the release at a revision. Raises Usage if its files are not released."""
    located = locate(session, actor, str(repository), revision)
    if located.release_id is None:
        raise Usage(
            "not_released",
            f"{located.full_name} has not been released.",
            subject=located.full_name,
            next_step="Create a tag first: a version, such as 1.0.0.",
        )
    return parse_version(session.get_one(Release, located.release_id).version)


def list_refs(session: Session, actor: Actor, named: str) -> Refs:
    """All names of commits in a repository, or in the one that `named` is an alias in. Must run in one snapshot."""
    exact = _parsed(named)
    if exact and repositories.exists(session, exact.repository):
        repository = exact.repository
    else:
        row = locate(session, actor, named, MAIN)
        repository = row.repository
    row, main = repositories.find(session, repository), _main(session, repository)
    versions = releases.list_versions(session, repository)
    channels = resolve.heads(session, row)[row.id].channels
    served = {name: versions[version] for name, version in channels.items() if name != MAIN}
    drafts = _head(session, repository) if NEXT not in channels and _sees_drafts(session, actor, repository) else None
    return Refs(main.commit if main else None, drafts.commit if drafts else None, served, versions)


def sees_all(session: Session, actor: Actor, repository: RepositoryName) -> bool:
    """Whether the actor sees all commits of the repository, whether or not they are drafts."""
    return not namespaces.has_drafts(session, repository.namespace) or _is_publisher(actor, repository)


def _sees_drafts(session: Session, actor: Actor, repository: RepositoryName) -> bool:
    return namespaces.has_drafts(session, repository.namespace) and _is_publisher(actor, repository)


def _is_publisher(actor: Actor, repository: RepositoryName) -> bool:
    return holds(actor, Role.PUBLISHER, str(repository))


def _readings(named: str) -> Iterator[tuple[RepositoryName, str]]:
    """The repositories that a name may stand for, each with its revision, longest repository name first."""
    namespace, _, name = named.partition("/")
    ends = [len(name), *(index for index in range(len(name) - 2, 0, -1) if name[index] == ".")]
    for end in ends:
        repository = _parsed(f"{namespace}/{name[:end]}")
        if repository is not None:
            yield repository.repository, name[end + 1 :]


def _at(session: Session, actor: Actor, repository: RepositoryName, revision: str) -> Located | None:
    """The files at a revision. A full commit comes first, since clients rely on its meaning."""
    if revision in (MAIN, commits.EMPTY):
        main = _main(session, repository)
        if main is None or revision in (MAIN, main.commit):
            return main
    commit = _parsed(f"{repository}#{revision}")
    if commit and len(revision) == COMMIT_DIGITS and (located := _of_commit(session, commit, actor)):
        return located
    if located := _pinned(session, repository, revision):
        return located
    if revision == NEXT and _sees_drafts(session, actor, repository):
        return _head(session, repository)
    return commit and _of_commit(session, commit, actor)


def _main(session: Session, repository: RepositoryName) -> Located | None:
    """The files of `main`: those of the last commit, else of the newest release; of the newest release alone where
    commits are drafts. None if there are none."""
    row = repositories.find_if_exists(session, repository)
    if row is None:
        return None
    if namespaces.has_drafts(session, repository.namespace):
        return _newest_accepted(session, row)
    if located := _head(session, repository):
        return located
    if commits.has_commits(session, row) or releases.list_versions(session, repository):
        return None
    return _empty(repository)


def _head(session: Session, repository: RepositoryName) -> Located | None:
    row = repositories.find_if_exists(session, repository)
    head = commits.head(session, row) if row else None
    return head and _of_commit(session, Reference(repository, commit=head.commit))


def _newest_accepted(session: Session, row: Repository) -> Located | None:
    """The newest release with the signature that its namespace requires now: some may be older than the requirement."""
    namespace, name = namespaces.find(session, row.namespace), repositories.name_of(row)
    order = (Release.stable.desc(), Release.sort_key.desc())
    query = select(Release).where(Release.repository_id == row.id, ~Release.yanked).order_by(*order)
    for release in session.scalars(query):
        named = (release.signed_by, release.signature_covers)
        signature = signatures.signer(session, release.id, namespace.signing_keys, named)
        if releases.has_required_signature(namespace, *signature):
            resolved = resolve.resolve_exact(session, Reference(name, version=parse_version(release.version)))
            return _of_release(resolved) if resolved else None
    return None


def _empty(repository: RepositoryName) -> Located:
    return Located(
        repository=repository,
        revision_id=0,
        commit=commits.EMPTY,
        manifest=commits.EMPTY_MANIFEST,
        full_name=str(repository),
    )


def _of_commit(session: Session, reference: Reference, actor: Actor | None = None) -> Located | None:
    """The files of a commit that the actor, if one is given, may see."""
    if released := resolve.resolve_exact(session, reference):
        return _of_release(released)
    if actor is not None and not sees_all(session, actor, reference.repository):
        return None
    repository = repositories.find_if_exists(session, reference.repository)
    revision = commits.find_revision(session, repository, reference.commit or "") if repository else None
    if revision is None:
        return None
    full_name = f"{reference.repository}#{revision.commit[:12]}"
    releases.refuse_taken_down(full_name, revision)
    return Located(
        repository=reference.repository,
        revision_id=revision.id,
        commit=revision.commit,
        manifest=revision.manifest,
        full_name=full_name,
    )


def _of_release(resolved: ResolvedRow) -> Located:
    row = resolved.row
    return Located(
        repository=RepositoryName(row.namespace, row.repository),
        revision_id=row.revision_id,
        commit=row.commit,
        manifest=row.manifest,
        full_name=resolved.full_name,
        release_id=row.id,
        warning=resolved.warning,
    )


def _pinned(session: Session, repository: RepositoryName, revision: str) -> Located | None:
    """The release with that version, which comes first since it never moves, or in that channel. Raises NotFound for a
    channel that serves only yanked releases."""
    version, channel = _parsed(f"{repository}:{revision}"), _parsed(f"{repository}@{revision}")
    if version and version.version and (resolved := resolve.resolve_exact(session, version)):
        return _of_release(resolved)
    try:
        return _of_release(resolve.locate(session, channel)) if channel else None
    except NotFound as error:
        if error.code == "no_match":
            raise
        return None


def _parsed(text: str) -> Reference | None:
    try:
        return parse_reference(text)
    except Usage:
        return None


def _unknown(session: Session, actor: Actor, repository: RepositoryName, revision: str) -> NotFound:
    refs = list_refs(session, actor, str(repository))
    detail = f"{repository} has no version, channel or commit {revision[:80]!r}."
    if revision == MAIN and namespaces.has_drafts(session, repository.namespace):
        detail = f"main of {repository} serves only releases that {repository.namespace} accepts, and there is none."
    elif revision == MAIN:
        detail = f"{repository} has no release that is not yanked."
    names = [*list(refs.channels)[:_LISTED], *list(refs.versions)[:_LISTED]]
    step = f"It has {', '.join(names)}." if names else "It has no release yet."
    if refs.drafts:
        step = f"Drafts are on {NEXT}: `create_tag` with a version publishes the last one. {step}"
    return NotFound("revision_unknown", detail, subject=revision[:80], next_step=step)
