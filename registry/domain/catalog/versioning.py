"""Version numbers: the next one, and whether a release may have the requested one."""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from sqlalchemy import select
from sqlalchemy.orm import Session

from composer.findings import Finding
from registry.database.tables import Release, Repository
from registry.domain.catalog import repositories
from registry.errors import Refused, Usage
from registry.formats import compatibility
from registry.formats.compatibility import Surface
from registry.formats.manifest import parse_manifest
from registry.formats.references import Version, parse_version

BUMPS = ("auto", "major", "minor", "patch")
FIRST_VERSION = Version(0, 1, 0)


def highest_stable(session: Session, repository: Repository, below: Version | None = None) -> Release | None:
    """The highest stable release that is not yanked, below a version if given."""
    query = select(Release).where(Release.repository_id == repository.id, Release.stable, ~Release.yanked)
    if below is not None:
        query = query.where(Release.sort_key < below.sort_key)
    return session.scalars(query.order_by(Release.sort_key.desc()).limit(1)).first()


def next_version(session: Session, repository: Repository, bump: str | None, new: Surface) -> Version:
    """The highest stable version, including yanked ones since none is reused, incremented by `bump`.

    `auto` increments what the change since the highest stable release requires.
    """
    if bump not in BUMPS:
        raise Usage("version_missing", "A push needs a version.", subject=str(repositories.name_of(repository)))
    if bump == "auto":
        return _auto(session, repository, lambda _previous: new)
    latest = _highest_number(session, repository)
    return latest.bump(bump) if latest else FIRST_VERSION


def unchanged_release(session: Session, repository: Repository, commit: str, base_digest: str) -> Release | None:
    """The highest stable release, if it has these files for this base: the answer of `--bump` for no change.

    Older or yanked releases do not count, since promoting them would move channels back or fail. Files that exist only
    as a pre-release get a version.
    """
    latest = highest_stable(session, repository)
    same = latest is not None and latest.revision.commit == commit and latest.base_digest == base_digest
    return latest if same else None


def refuse_breaking(
    session: Session, repository: Repository, version: Version, new: Surface, commit: str, allowed: str | None
) -> str | None:
    """Raises Refused for a breaking change under a version that promises compatibility, unless there is an `allowed`
    reason.

    Returns the reason if it was needed, else None. A release is compared with the one that a range would have resolved
    to: the highest stable release below it that is not yanked. It must not break with the next release above it either,
    since that would be an update of this one. A pre-release is judged like the release that it leads to.
    """
    findings, previous = _broken_neighbour(session, repository, version, lambda _neighbour: new)
    if not findings or (allowed and allowed.strip()):
        return allowed if findings else None
    if same := unchanged_release(session, repository, commit, new.base):
        right = f"It is already published as {same.version}: use that"
    else:
        right = _suggested_version(session, repository, lambda _previous: new, ", which --bump auto finds")
    next_step = f"{right}, or give a reason with --allow-breaking REASON."
    raise _breaking(repository, version, previous, findings, next_step)


def refuse_other_base(session: Session, repository: Repository, version: Version, base_digest: str) -> None:
    """Like `refuse_breaking`, for a release whose base alone is known so far."""

    def beside(neighbour: Surface) -> Surface:
        return replace(neighbour, base=base_digest, weights=frozenset())

    findings, previous = _broken_neighbour(session, repository, version, beside)
    if findings:
        raise _breaking(repository, version, previous, findings, f"{_suggested_version(session, repository, beside)}.")


def _suggested_version(
    session: Session, repository: Repository, beside: Callable[[Surface], Surface], by: str = ""
) -> str:
    try:
        return f"Publish it as {_auto(session, repository, beside)}{by}"
    except Usage:  # no version follows the highest one
        return "Publish it in its own repository, since this one has no version numbers left"


def _breaking(
    repository: Repository, version: Version, previous: Version, findings: list[Finding], next_step: str
) -> Refused:
    return Refused(
        "breaking_change",
        f"{version} would break users of ^{previous}. {' '.join(finding.message for finding in findings)}",
        subject=f"{repositories.name_of(repository)}:{version}",
        next_step=next_step,
        findings=[finding.to_json() for finding in findings],
    )


def _broken_neighbour(
    session: Session, repository: Repository, version: Version, beside: Callable[[Surface], Surface]
) -> tuple[list[Finding], Version]:
    """The breaking changes between the release and its neighbours, and the version whose users would be affected.

    `beside` returns the release's own surface for comparison with a neighbour's.
    """
    below = highest_stable(session, repository, version)
    higher = select(Release).where(Release.repository_id == repository.id, Release.stable, ~Release.yanked)
    higher = higher.where(Release.sort_key > version.sort_key).order_by(Release.sort_key)
    above = session.scalars(higher.limit(1)).first()
    judged = below is not None and not compatibility.outside_caret_range(parse_version(below.version), version)
    if below is not None and judged:
        old = _surface(below)
        if findings := compatibility.breaking_changes(old, beside(old)):
            return findings, parse_version(below.version)
    if (
        version.stable
        and above is not None
        and not compatibility.outside_caret_range(version, parse_version(above.version))
    ):
        newer = _surface(above)
        return compatibility.breaking_changes(beside(newer), newer), version
    return [], version


def _highest_number(session: Session, repository: Repository) -> Version | None:
    query = select(Release.version).where(Release.repository_id == repository.id, Release.stable)
    latest = session.scalars(query.order_by(Release.sort_key.desc()).limit(1)).first()
    return parse_version(latest) if latest else None


def _auto(session: Session, repository: Repository, beside: Callable[[Surface], Surface]) -> Version:
    """The version of `--bump auto`, which is also the one suggested for a refused release.

    `beside` is as for `_broken_neighbour`.
    """
    latest, previous = _highest_number(session, repository), highest_stable(session, repository)
    if latest is None:
        return FIRST_VERSION
    change: Literal["breaking", "weights", "files"] = "weights"
    if previous is not None:
        old = _surface(previous)
        new = beside(old)
        change = (
            "breaking"
            if compatibility.breaking_changes(old, new)
            else "files"
            if old.weights == new.weights
            else "weights"
        )
    return latest.bump(compatibility.required_bump(change, latest))


def _surface(release: Release) -> Surface:
    return compatibility.surface(release.base_digest, release.facts, parse_manifest(release.revision.manifest))
