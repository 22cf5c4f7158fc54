"""Resolves references to releases."""

from dataclasses import dataclass, field, replace
from typing import Any

from sqlalchemy import bindparam, func, select
from sqlalchemy.orm import Session

from registry.database.prepared import Prepared
from registry.database.tables import Channel, Move, Release, Repository, Revision
from registry.domain.catalog import releases, repositories, set_members
from registry.domain.catalog.release_rows import COLUMNS, NAMED
from registry.domain.catalog.repositories import Kind
from registry.domain.channels.serving import find_channel, serving_move
from registry.errors import NotFound, Usage
from registry.formats.references import Reference, RepositoryName, parse_version

_channel, _move, _release, _repository, _revision = (
    table.__table__.c for table in (Channel, Move, Release, Repository, Revision)
)
"""Tables, not mapped classes: mapping rows would cost as much as the statement itself."""

_NEEDED = (
    *("id", "revision_id", "namespace", "repository", "kind", "version", "commit", "manifest", "size_bytes"),
    *("taken_down_at", "takedown_reason", "base_digest", "base_name", "yanked", "yank_reason"),
    *("deprecated_reason", "successor", "base_deprecated_reason", "base_successor"),
)
_RELEASES = select(*(COLUMNS[name].label(name) for name in _NEEDED)).select_from(NAMED)
"""Everything that serving nodes need to fetch a release, in one statement."""

_IN_REPOSITORY = _RELEASES.where(
    _repository.namespace == bindparam("in_namespace"), _repository.name == bindparam("in_repository")
)
_HIGHEST_FIRST = _IN_REPOSITORY.order_by(_release.sort_key.desc())
_OF_VERSION = Prepared(_IN_REPOSITORY.where(_release.version == bindparam("named")))
# A range instead of LIKE, which cannot use the index: "g" sorts after every hexadecimal digit.
_OF_COMMIT = Prepared(_HIGHEST_FIRST.where(_revision.commit.between(bindparam("named"), bindparam("last"))))
OF_CHANNEL = (
    _IN_REPOSITORY.join(Move.__table__, _move.to_release_id == _release.id)
    .join(Channel.__table__, _channel.move_id == _move.id)
    .where(_channel.repository_id == _repository.id, _channel.name == bindparam("named"))
)
_OF_CHANNEL = Prepared(OF_CHANNEL)
_HIGHEST_STABLE = Prepared(_HIGHEST_FIRST.where(_release.stable, ~_release.yanked).limit(1))
_HIGHEST = Prepared(_HIGHEST_FIRST.where(~_release.yanked).limit(1))
_BY_ID = Prepared(_RELEASES.where(_release.id == bindparam("named")))


@dataclass(frozen=True, slots=True)
class ResolvedRow:
    """A row of `_RELEASES`. `remark` is set if it is yanked or replaces a yanked release."""

    row: Any
    remark: str = ""

    @property
    def warning(self) -> str:
        """The remark, and whether the release or its base is deprecated."""
        row = self.row
        if row.deprecated_reason is None and row.base_deprecated_reason is None:
            return self.remark
        own = deprecation_text(self.full_name, row.deprecated_reason, row.successor)
        base = deprecation_text(f"The base {row.base_name}", row.base_deprecated_reason, row.base_successor)
        return " ".join(filter(None, (self.remark, own, base)))

    @property
    def full_name(self) -> str:
        return f"{self.row.namespace}/{self.row.repository}:{self.row.version}"


def deprecation_text(what: str, reason: str | None, successor: str | None) -> str:
    """The text of a deprecation; empty without one."""
    if reason is None:
        return ""
    return f"{what} is deprecated: {reason}" + (f"; use {successor}." if successor else ".")


@dataclass(slots=True)
class Heads:
    """A repository's `latest`, the highest stable version, and `channels`, the version that each serves."""

    latest: str | None = None
    channels: dict[str, str] = field(default_factory=dict[str, str])


def resolve(session: Session, reference: Reference, kind: Kind | None = None) -> Release:
    """The release that `locate` finds, as a mapped row. Raises the same errors."""
    return session.get_one(Release, locate(session, reference, kind).row.id)


def locate(session: Session, reference: Reference, kind: Kind | None = None) -> ResolvedRow:
    """Resolves a reference. Finds yanked releases only by exact version or commit, and never one that was taken down.
    Raises
    NotFound."""
    resolved = _exact(session, reference)
    if resolved is None and reference.range:
        resolved = _by_range(session, reference)
    elif resolved is None and reference.channel:
        resolved = _by_channel(session, reference)
    if resolved is None or (kind and resolved.row.kind != kind):
        repositories.find(session, reference.repository, kind)
        raise _nothing(session, reference)
    return _with_members(session, resolved)


def resolve_exact(session: Session, reference: Reference) -> ResolvedRow | None:
    """Resolves with a single statement, which sees one consistent state; the members of a set take one more. None if it
    needs more than that."""
    resolved = _exact(session, reference)
    return _with_members(session, resolved) if resolved else None


def _with_members(session: Session, resolved: ResolvedRow) -> ResolvedRow:
    """The row with a remark on the members of a set that are withdrawn."""
    if resolved.row.kind != Kind.SET:
        return resolved
    return replace(
        resolved, remark=" ".join(filter(None, (resolved.remark, *set_members.warnings(session, resolved.row.id))))
    )


def _exact(session: Session, reference: Reference) -> ResolvedRow | None:
    if reference.range:
        return None
    if reference.commit:
        digits = reference.commit or ""
        rows = _rows(session, _OF_COMMIT, reference.repository, named=digits, last=digits.ljust(40, "g"))
        if len({row.revision_id for row in rows}) > 1:
            raise Usage("commit_ambiguous", f"Several commits begin with {reference.commit}.", subject=str(reference))
        return _warn_if_yanked(rows[0]) if rows else None
    if reference.version:
        rows = _rows(session, _OF_VERSION, reference.repository, named=str(reference.version))
        return _warn_if_yanked(rows[0]) if rows else None
    if reference.channel:
        rows = _rows(session, _OF_CHANNEL, reference.repository, named=reference.channel)
        return ResolvedRow(rows[0]) if rows and not rows[0].yanked else None
    rows = _rows(session, _HIGHEST_STABLE, reference.repository)
    return ResolvedRow(rows[0]) if rows else None


def newest(session: Session, repository: RepositoryName) -> ResolvedRow | None:
    """The highest stable release or, without one, the highest pre-release; never a yanked one."""
    rows = _rows(session, _HIGHEST_STABLE, repository) or _rows(session, _HIGHEST, repository)
    return ResolvedRow(rows[0]) if rows else None


def newest_ids(session: Session, *listed: Repository) -> dict[int, int]:
    """The id of each repository's `newest` release, by repository id, with one query for a page."""
    first = (Release.stable.desc(), Release.sort_key.desc())
    order = func.row_number().over(partition_by=Release.repository_id, order_by=first).label("order")
    ranked = select(Release.id, Release.repository_id, order)
    ranked = ranked.where(Release.repository_id.in_([row.id for row in listed]), ~Release.yanked).subquery()
    query = select(ranked.c.repository_id, ranked.c.id).where(ranked.c.order == 1)
    return dict(session.execute(query).all())


def heads(session: Session, *listed: Repository) -> dict[int, Heads]:
    """Heads by repository id, with two queries for a page, and more for channels whose last release is yanked."""
    heads_by_id = {repository.id: Heads() for repository in listed}
    top = select(Release.repository_id, func.max(Release.sort_key).label("sort_key"))
    top = top.where(Release.repository_id.in_(heads_by_id), Release.stable, ~Release.yanked)
    top = top.group_by(Release.repository_id).subquery()
    is_top = (Release.repository_id == top.c.repository_id) & (Release.sort_key == top.c.sort_key)
    for repository_id, version in session.execute(select(Release.repository_id, Release.version).join(top, is_top)):
        heads_by_id[repository_id].latest = version
    moved = select(Channel, Release.version, Release.yanked).join(Move, Move.id == Channel.move_id)
    moved = moved.join(Release, Release.id == Move.to_release_id).where(Channel.repository_id.in_(heads_by_id))
    for channel, version, yanked in session.execute(moved.order_by(Channel.name)):
        serving = serving_move(session, channel) if yanked else None
        if serving or not yanked:
            heads = heads_by_id[channel.repository_id]
            heads.channels[channel.name] = serving.to_release.version if serving else version
    return heads_by_id


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


def _by_channel(session: Session, reference: Reference) -> ResolvedRow:
    """Resolves a channel whose last release is yanked."""
    rows = _rows(session, _OF_CHANNEL, reference.repository, named=reference.channel or "")
    repository = repositories.find(session, reference.repository)
    channel = find_channel(session, repository, reference.channel or "")
    serving = serving_move(session, channel)
    if serving is None:
        raise NotFound("no_match", f"{reference} serves only yanked releases.", subject=str(reference))
    row = _by_id(session, serving.to_release_id)
    if not rows:  # the channel's first move was committed just now
        return ResolvedRow(row)
    name, reason = ResolvedRow(rows[0]).full_name, rows[0].yank_reason
    if row.id == rows[0].id:
        return ResolvedRow(row, f"{name} is yanked ({reason}); the policy of {reference} keeps it until the next move.")
    return ResolvedRow(row, f"{name} is yanked ({reason}); {reference} serves {row.version}.")


def _warn_if_yanked(row: Any) -> ResolvedRow:
    """The row with a remark if it is yanked. Raises NotFound if its files were taken down."""
    resolved = ResolvedRow(row)
    releases.refuse_taken_down(resolved.full_name, row)
    return ResolvedRow(row, f"{resolved.full_name} is yanked: {row.yank_reason}.") if row.yanked else resolved


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
