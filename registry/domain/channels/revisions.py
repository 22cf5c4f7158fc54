"""Revisions as clients of the Hugging Face Hub name them.

A revision is `main`, a version with or without `v`, a channel, or a commit. `main` is the newest release. Programs that
cannot name a revision write it behind the repository: `acme/sql.prod`, `acme/sql.v1.2.0`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from sqlalchemy.orm import Session

from registry.domain.catalog import releases, repositories
from registry.domain.channels import resolve
from registry.domain.channels.resolve import ResolvedRow
from registry.errors import NotFound, Usage
from registry.formats.references import Reference, RepositoryName, parse_reference

MAIN = "main"
COMMIT_DIGITS = 40
_LISTED = 5
"""Maximum number of channels and of versions that an error lists."""


@dataclass(frozen=True, slots=True)
class Refs:
    """The commits that a repository's names stand for: `main` if it has a release, channels, and versions."""

    main: str | None
    channels: dict[str, str]
    versions: dict[str, str]


def locate(session: Session, named: str, revision: str) -> ResolvedRow:
    """The release at a revision of the repository `named`, or of the repository that `named` is an alias in. Raises
    NotFound.

    A repository of exactly that name comes first. With an alias, `main` is the revision that the alias names.
    """
    for repository, suffix in _readings(named):
        if not suffix:
            if row := _at(session, repository, revision):
                return row
            if repositories.exists(session, repository):
                raise _unknown(session, repository, revision)
        elif row := _pinned(session, repository, suffix):
            row = row if revision == MAIN else _at(session, repository, revision)
            if row is None:
                raise _unknown(session, repository, revision)
            return row
    raise repositories.unknown(named)


def list_refs(session: Session, named: str) -> Refs:
    """All names of commits in a repository, or in the one that `named` is an alias in. Call it in a snapshot."""
    exact = _parsed(named)
    if exact and repositories.exists(session, exact.repository):
        repository = exact.repository
    else:
        row = locate(session, named, MAIN).row
        repository = RepositoryName(row.namespace, row.repository)
    row, newest = repositories.find(session, repository), resolve.newest(session, repository)
    versions = releases.list_versions(session, repository)
    channels = resolve.heads(session, row)[row.id].channels
    served = {name: versions[version] for name, version in channels.items() if name != MAIN}
    return Refs(newest.row.commit if newest else None, served, versions)


def _readings(named: str) -> Iterator[tuple[RepositoryName, str]]:
    """The repositories that a name may stand for, each with the revision behind it: the longest repository first."""
    namespace, _, name = named.partition("/")
    ends = [len(name), *(index for index in range(len(name) - 2, 0, -1) if name[index] == ".")]
    for end in ends:
        repository = _parsed(f"{namespace}/{name[:end]}")
        if repository is not None:
            yield repository.repository, name[end + 1 :]


def _at(session: Session, repository: RepositoryName, revision: str) -> ResolvedRow | None:
    """The release at a revision. A full commit comes first, since clients rely on its meaning."""
    if revision == MAIN:
        return resolve.newest(session, repository)
    commit = _parsed(f"{repository}#{revision}")
    if commit and len(revision) == COMMIT_DIGITS and (row := resolve.resolve_exact(session, commit)):
        return row
    return _pinned(session, repository, revision) or (commit and resolve.resolve_exact(session, commit))


def _pinned(session: Session, repository: RepositoryName, revision: str) -> ResolvedRow | None:
    """The release with a version, which comes first since it never moves, or in a channel. Raises NotFound for a
    channel that serves only yanked releases."""
    version, channel = _parsed(f"{repository}:{revision}"), _parsed(f"{repository}@{revision}")
    if version and version.version and (row := resolve.resolve_exact(session, version)):
        return row
    try:
        return resolve.locate(session, channel) if channel else None
    except NotFound as error:
        if error.code == "no_match":
            raise
        return None


def _parsed(text: str) -> Reference | None:
    try:
        return parse_reference(text)
    except Usage:
        return None


def _unknown(session: Session, repository: RepositoryName, revision: str) -> NotFound:
    if revision == MAIN:
        detail = f"{repository} has no release that is not yanked."
    else:
        detail = f"{repository} has no version, channel or commit {revision[:80]!r}."
    refs = list_refs(session, str(repository))
    names = [*list(refs.channels)[:_LISTED], *list(refs.versions)[:_LISTED]]
    step = f"It has {', '.join(names)}." if names else "It has no release yet."
    return NotFound("revision_unknown", detail, subject=revision[:80], next_step=step)
