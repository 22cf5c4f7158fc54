"""Reference -> release."""

from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import bindparam, func, select
from sqlalchemy.orm import Session

from registry.database.prepared import Prepared
from registry.database.tables import Base, Channel, Move, Release, Repository, Revision
from registry.domain.catalog import releases, repositories
from registry.domain.catalog.repositories import Kind
from registry.domain.channels import moves
from registry.errors import NotFound, Usage
from registry.formats.references import Reference, RepositoryName, parse_version

_base, _channel, _move, _release, _repository, _revision = (
    table.__table__.c for table in (Base, Channel, Move, Release, Repository, Revision)
)
"""Of tables, not of objects: a resolve is little more than its statement, and mapped rows would cost as much again."""

_FOUND = (
    select(
        _release.id,
        _release.revision_id,
        _repository.namespace,
        _repository.name.label("repository"),
        _repository.kind,
        _release.version,
        _revision.commit,
        _revision.manifest,
        _base.digest.label("base_digest"),
        _base.name.label("base_name"),
        _release.yanked,
        _release.yank_reason,
        _release.size_bytes,
    )
    .select_from(Release.__table__)
    .join(Repository.__table__, _repository.id == _release.repository_id)
    .join(Revision.__table__, _revision.id == _release.revision_id)
    .join(Base.__table__, _base.digest == _release.base_digest)
)
"""All that fetching a release needs, in one statement: a serving node asks for nothing else."""

_IN_REPOSITORY = _FOUND.where(
    _repository.namespace == bindparam("in_namespace"), _repository.name == bindparam("in_repository")
)
_HIGHEST_FIRST = _IN_REPOSITORY.order_by(_release.sort_key.desc())
_OF_VERSION = Prepared(_IN_REPOSITORY.where(_release.version == bindparam("named")))
# Not LIKE, for which no index serves: "g" is above every hexadecimal digit.
_OF_COMMIT = Prepared(_HIGHEST_FIRST.where(_revision.commit.between(bindparam("named"), bindparam("last"))))
OF_CHANNEL = (
    _IN_REPOSITORY.join(Move.__table__, _move.to_release_id == _release.id)
    .join(Channel.__table__, _channel.move_id == _move.id)
    .where(_channel.repository_id == _repository.id, _channel.name == bindparam("named"))
)
_OF_CHANNEL = Prepared(OF_CHANNEL)
_HIGHEST_STABLE = Prepared(_HIGHEST_FIRST.where(_release.stable, ~_release.yanked).limit(1))
_BY_ID = Prepared(_FOUND.where(_release.id == bindparam("named")))


@dataclass(frozen=True, slots=True)
class ResolvedRow:
    """A row of `_FOUND`. `warning` says that the reference did not lead where it plainly should have."""

    row: Any
    warning: str = ""

    @property
    def full_name(self) -> str:
        return f"{self.row.namespace}/{self.row.repository}:{self.row.version}"


@dataclass(frozen=True, slots=True)
class Resolved:
    release: Release
    warning: str = ""


@dataclass(slots=True)
class Heads:
    """What a repository leads to: `latest` is its highest stable version, `channels` the version that each gives."""

    latest: str | None = None
    channels: dict[str, str] = field(default_factory=dict[str, str])


def resolve(session: Session, reference: Reference, kind: Kind | None = None) -> Resolved:
    """As `locate`, with the whole release."""
    found = locate(session, reference, kind)
    return Resolved(session.get_one(Release, found.row.id), found.warning)


def locate(session: Session, reference: Reference, kind: Kind | None = None) -> ResolvedRow:
    """Raises NotFound when nothing matches. Yanked releases are found only by exact version and by commit."""
    found = resolve_exact(session, reference)
    if found is None and reference.range:
        found = _by_range(session, reference)
    elif found is None and reference.channel:
        found = _by_channel(session, reference)
    if found is None or (kind and found.row.kind != kind):
        repositories.find(session, reference.repository, kind)
        raise _nothing(session, reference)
    return found


def resolve_exact(session: Session, reference: Reference) -> ResolvedRow | None:
    """What one statement tells, and so is of one moment. None where there is more to ask."""
    if reference.range:
        return None
    if reference.commit:
        return _by_commit(session, reference)
    if reference.version:
        rows = _rows(session, _OF_VERSION, reference.repository, named=str(reference.version))
        return _warn_if_yanked(rows[0]) if rows else None
    if reference.channel:
        rows = _rows(session, _OF_CHANNEL, reference.repository, named=reference.channel)
        return ResolvedRow(rows[0]) if rows and not rows[0].yanked else None
    rows = _rows(session, _HIGHEST_STABLE, reference.repository)
    return ResolvedRow(rows[0]) if rows else None


def heads(session: Session, *listed: Repository) -> dict[int, Heads]:
    """By repository id; two queries for a page of repositories, and more for channels whose last release is yanked."""
    found = {repository.id: Heads() for repository in listed}
    top = select(Release.repository_id, func.max(Release.sort_key).label("sort_key"))
    top = top.where(Release.repository_id.in_(found), Release.stable, ~Release.yanked)
    top = top.group_by(Release.repository_id).subquery()
    is_top = (Release.repository_id == top.c.repository_id) & (Release.sort_key == top.c.sort_key)
    for repository_id, version in session.execute(select(Release.repository_id, Release.version).join(top, is_top)):
        found[repository_id].latest = version
    moved = select(Channel, Release.version, Release.yanked).join(Move, Move.id == Channel.move_id)
    moved = moved.join(Release, Release.id == Move.to_release_id).where(Channel.repository_id.in_(found))
    for channel, version, yanked in session.execute(moved.order_by(Channel.name)):
        served = moves.effective_move(session, channel) if yanked else None
        if served or not yanked:
            found[channel.repository_id].channels[channel.name] = served.to_release.version if served else version
    return found


def _rows(session: Session, statement: Prepared, repository: RepositoryName, **named: str) -> list[Any]:
    home = {"in_namespace": repository.namespace, "in_repository": repository.name}
    return statement.records(session, {**home, **named})


def _by_id(session: Session, release_id: int) -> Any:
    [row] = _BY_ID.records(session, {"named": release_id})
    return row


def _by_range(session: Session, reference: Reference) -> ResolvedRow | None:
    repository = repositories.find(session, reference.repository)
    query = select(Release.id, Release.version).where(Release.repository_id == repository.id, ~Release.yanked)
    for release_id, version in session.execute(query.order_by(Release.sort_key.desc())):
        if reference.range and parse_version(version) in reference.range:
            return ResolvedRow(_by_id(session, release_id))
    return None


def _by_commit(session: Session, reference: Reference) -> ResolvedRow | None:
    digits = reference.commit or ""
    rows = _rows(session, _OF_COMMIT, reference.repository, named=digits, last=digits.ljust(40, "g"))
    if len({row.revision_id for row in rows}) > 1:
        raise Usage(
            "commit_ambiguous",
            f"Several commits begin with {reference.commit}.",
            subject=str(reference),
            next_step="Give more digits.",
        )
    return _warn_if_yanked(rows[0]) if rows else None


def _by_channel(session: Session, reference: Reference) -> ResolvedRow:
    """Where the last move's release is yanked."""
    rows = _rows(session, _OF_CHANNEL, reference.repository, named=reference.channel or "")
    repository = repositories.find(session, reference.repository)
    channel = moves.find(session, repository, reference.channel or "")
    serving = moves.effective_move(session, channel)
    if serving is None:
        raise NotFound(
            "no_match",
            f"{reference} serves only yanked releases.",
            subject=str(reference),
            next_step="Promote a release to it.",
        )
    row = _by_id(session, serving.to_release_id)
    if not rows:  # the channel's first move was committed a moment ago
        return ResolvedRow(row)
    name, reason = ResolvedRow(rows[0]).full_name, rows[0].yank_reason
    return ResolvedRow(row, f"{name} is yanked ({reason}); {reference} gives {row.version}.")


def _warn_if_yanked(row: Any) -> ResolvedRow:
    found = ResolvedRow(row)
    return ResolvedRow(row, f"{found.full_name} is yanked: {row.yank_reason}.") if row.yanked else found


def _nothing(session: Session, reference: Reference) -> NotFound:
    if reference.version:
        return releases.unknown(session, reference.repository, reference.version)
    what = "no stable release that is not yanked"
    if reference.range:
        what = f"no release in the range {reference.range.text} that is not yanked"
    elif reference.commit:
        what = f"no release with the commit {reference.commit}"
    return NotFound(
        "no_match",
        f"{reference.repository} has {what}.",
        subject=str(reference),
        next_step=f"`adaptory log {reference.repository}` shows its releases.",
    )
