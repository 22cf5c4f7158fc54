"""Reference -> release."""

from dataclasses import dataclass, field

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from registry import channels, numbering, releases, repositories
from registry.errors import NotFound, Usage
from registry.models import Channel, Move, Release, Repository, Revision
from registry.names import Reference, parse_version
from registry.releases import full_name
from registry.repositories import Kind


@dataclass(frozen=True, slots=True)
class Resolved:
    """`warning` says that the reference did not lead where it plainly should have."""

    release: Release
    warning: str = ""


@dataclass(slots=True)
class Heads:
    """What a repository leads to: `latest` is its highest stable version, `channels` the version on each."""

    latest: str | None = None
    channels: dict[str, str] = field(default_factory=dict[str, str])


def resolve(session: Session, reference: Reference, kind: Kind | None = None) -> Resolved:
    """Raises NotFound when nothing matches. Yanked releases are found only by exact version and by commit."""
    repository = repositories.find(session, reference.repository, kind)
    if reference.version:
        return _warn_if_yanked(releases.find(session, reference.repository, reference.version))
    if reference.commit:
        return _warn_if_yanked(_by_commit(session, repository, reference))
    if reference.channel:
        return _by_channel(session, repository, reference)
    release = (
        _in_range(session, repository, reference) if reference.range else numbering.highest_stable(session, repository)
    )
    if release is None:
        what = f"no release in the range {reference.range.text}" if reference.range else "no stable release"
        raise NotFound(
            "no_match",
            f"{reference.repository} has {what} that is not yanked.",
            subject=str(reference),
            next_step=f"`adaptory log {reference.repository}` shows its releases.",
        )
    return Resolved(release)


def heads(session: Session, *listed: Repository) -> dict[int, Heads]:
    """By repository id; two queries for a page of repositories."""
    found = {repository.id: Heads() for repository in listed}
    top = select(Release.repository_id, func.max(Release.sort_key).label("sort_key"))
    top = top.where(Release.repository_id.in_(found), Release.stable, ~Release.yanked)
    top = top.group_by(Release.repository_id).subquery()
    is_top = (Release.repository_id == top.c.repository_id) & (Release.sort_key == top.c.sort_key)
    for repository_id, version in session.execute(select(Release.repository_id, Release.version).join(top, is_top)):
        found[repository_id].latest = version
    served = select(Channel.repository_id, Channel.name, Release.version).join(Move, Move.id == Channel.move_id)
    served = served.join(Release, Release.id == Move.to_release_id).where(Channel.repository_id.in_(found))
    for repository_id, channel, version in session.execute(served.order_by(Channel.name)):
        found[repository_id].channels[channel] = version
    return found


def _in_range(session: Session, repository: Repository, reference: Reference) -> Release | None:
    query = select(Release.id, Release.version).where(Release.repository_id == repository.id, ~Release.yanked)
    for release_id, version in session.execute(query.order_by(Release.sort_key.desc())):
        if reference.range and parse_version(version) in reference.range:
            return session.get(Release, release_id)
    return None


def _by_commit(session: Session, repository: Repository, reference: Reference) -> Release:
    digits = reference.commit or ""
    query = select(Release).join(Revision, Revision.id == Release.revision_id)
    # Not LIKE, for which no index serves: "g" is above every hexadecimal digit.
    query = query.where(Revision.repository_id == repository.id, Revision.commit.between(digits, digits.ljust(40, "g")))
    found = session.scalars(query.order_by(Release.sort_key.desc())).all()
    if not found:
        raise NotFound(
            "no_match",
            f"{reference.repository} has no release with the commit {reference.commit}.",
            subject=str(reference),
            next_step=f"`adaptory log {reference.repository}` shows its releases.",
        )
    if len({release.revision_id for release in found}) > 1:
        raise Usage(
            "commit_ambiguous",
            f"Several commits begin with {reference.commit}.",
            subject=str(reference),
            next_step="Give more digits.",
        )
    return found[0]


def _by_channel(session: Session, repository: Repository, reference: Reference) -> Resolved:
    channel = channels.find(session, repository, reference.channel or "")
    current, serving = channels.current_move(session, channel), channels.serving(session, channel)
    if current is None or serving is None:
        raise NotFound(
            "no_match",
            f"{reference} serves only yanked releases.",
            subject=str(reference),
            next_step="Promote a release to it.",
        )
    if serving.id == current.id:
        return Resolved(serving.to_release)
    yanked = current.to_release
    return Resolved(
        serving.to_release,
        f"{full_name(yanked)} is yanked ({yanked.yank_reason}); {reference} gives {serving.to_release.version}.",
    )


def _warn_if_yanked(release: Release) -> Resolved:
    return Resolved(release, f"{full_name(release)} is yanked: {release.yank_reason}." if release.yanked else "")
