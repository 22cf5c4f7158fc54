"""Reference -> release."""

from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry import channels, releases, repositories
from registry.errors import NotFound, Usage
from registry.models import Release, Repository, Revision
from registry.names import Reference, parse_version
from registry.releases import full_name
from registry.repositories import Kind


@dataclass(frozen=True, slots=True)
class Resolved:
    """`warning` says that the reference did not lead where it plainly should have."""

    release: Release
    warning: str = ""


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
        _in_range(session, repository, reference) if reference.range else releases.highest_stable(session, repository)
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


def _in_range(session: Session, repository: Repository, reference: Reference) -> Release | None:
    query = select(Release.id, Release.version).where(Release.repository_id == repository.id, ~Release.yanked)
    for release_id, version in session.execute(query.order_by(Release.sort_key.desc())):
        if reference.range and parse_version(version) in reference.range:
            return session.get(Release, release_id)
    return None


def _by_commit(session: Session, repository: Repository, reference: Reference) -> Release:
    query = select(Release).join(Revision, Revision.id == Release.revision_id)
    query = query.where(Revision.repository_id == repository.id, Revision.commit.startswith(reference.commit or ""))
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
