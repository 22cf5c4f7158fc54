"""Which number a release gets, and whether it may have the one it asks for."""

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
    """The highest stable release that is not yanked, of those below a version if one is given."""
    query = select(Release).where(Release.repository_id == repository.id, Release.stable, ~Release.yanked)
    if below is not None:
        query = query.where(Release.sort_key < below.sort_key)
    return session.scalars(query.order_by(Release.sort_key.desc()).limit(1)).first()


def next_version(session: Session, repository: Repository, bump: str | None, new: Surface) -> Version:
    """The highest stable number, yanked ones too since none is given twice, counted up as `bump` says.

    `auto` counts up what the change from the highest stable release needs.
    """
    if bump not in BUMPS:
        raise Usage(
            "version_missing",
            "A push needs a version.",
            subject=str(repositories.name_of(repository)),
            next_step="Write REPO:VERSION, or --bump auto|patch|minor|major.",
        )
    if bump == "auto":
        return _auto(session, repository, lambda _previous: new)
    latest = _highest_number(session, repository)
    return latest.bump(bump) if latest else FIRST_VERSION


def unchanged_release(session: Session, repository: Repository, commit: str, base_digest: str) -> Release | None:
    """The highest stable release, if it has these files for this base: what `--bump` answers when nothing has changed.

    An older one, or one that is yanked, is not what is asked for: it would move channels back, or nowhere. What was a
    pre-release alone so far is given a number.
    """
    latest = highest_stable(session, repository)
    same = latest is not None and latest.revision.commit == commit and latest.base_digest == base_digest
    return latest if same else None


def refuse_breaking(
    session: Session, repository: Repository, version: Version, new: Surface, commit: str, allowed: str | None
) -> str | None:
    """Raises Refused for a breaking change under a number that promises none; `allowed` lets it through.

    Returns the reason that was needed, None when nothing breaks. A release is compared with what a range would have
    resolved to: the highest stable release below it that is not yanked. The next one above it must not break it either,
    for it would be an update of this one. A pre-release is judged like the release that it leads to.
    """
    found, previous = _broken_neighbour(session, repository, version, lambda _neighbour: new)
    if not found or (allowed and allowed.strip()):
        return allowed if found else None
    if same := unchanged_release(session, repository, commit, new.base):
        right = f"It is released already, as {same.version}: use that"
    else:
        right = _suggested_version(session, repository, lambda _previous: new, ", which --bump auto finds")
    next_step = f"{right}, or say why not with --allow-breaking REASON."
    raise _breaking(repository, version, previous, found, next_step)


def refuse_other_base(session: Session, repository: Repository, version: Version, base_digest: str) -> None:
    """`refuse_breaking` for a release of which no more than the base is known yet."""

    def beside(neighbour: Surface) -> Surface:
        return replace(neighbour, base=base_digest, weights=frozenset())

    found, previous = _broken_neighbour(session, repository, version, beside)
    if found:
        raise _breaking(repository, version, previous, found, f"{_suggested_version(session, repository, beside)}.")


def _suggested_version(
    session: Session, repository: Repository, beside: Callable[[Surface], Surface], by: str = ""
) -> str:
    try:
        return f"Publish it as {_auto(session, repository, beside)}{by}"
    except Usage:  # no number follows the highest one
        return "Publish it in a repository of its own, since no number is left in this one"


def _breaking(
    repository: Repository, version: Version, previous: Version, found: list[Finding], next_step: str
) -> Refused:
    return Refused(
        "breaking_change",
        f"{version} would break who follows ^{previous}. {' '.join(one.message for one in found)}",
        subject=f"{repositories.name_of(repository)}:{version}",
        next_step=next_step,
        findings=[one.to_json() for one in found],
    )


def _broken_neighbour(
    session: Session, repository: Repository, version: Version, beside: Callable[[Surface], Surface]
) -> tuple[list[Finding], Version]:
    """What breaks between the release and the ones below and above it, and the version whose followers would see it.

    `beside` gives the release's own surface, as it is to be compared with that of a neighbour.
    """
    below, above = highest_stable(session, repository, version), _lowest_stable(session, repository, version)
    judged = below is not None and not compatibility.outside_caret_range(parse_version(below.version), version)
    if below is not None and judged:
        old = _surface(below)
        if found := compatibility.breaking_changes(old, beside(old)):
            return found, parse_version(below.version)
    if (
        version.stable
        and above is not None
        and not compatibility.outside_caret_range(version, parse_version(above.version))
    ):
        newer = _surface(above)
        return compatibility.breaking_changes(beside(newer), newer), version
    return [], version


def _lowest_stable(session: Session, repository: Repository, above: Version) -> Release | None:
    query = select(Release).where(Release.repository_id == repository.id, Release.stable, ~Release.yanked)
    query = query.where(Release.sort_key > above.sort_key)
    return session.scalars(query.order_by(Release.sort_key).limit(1)).first()


def _highest_number(session: Session, repository: Repository) -> Version | None:
    query = select(Release.version).where(Release.repository_id == repository.id, Release.stable)
    latest = session.scalars(query.order_by(Release.sort_key.desc()).limit(1)).first()
    return parse_version(latest) if latest else None


def _auto(session: Session, repository: Repository, beside: Callable[[Surface], Surface]) -> Version:
    """What `--bump auto` gives, and what a refused release is told to be published as: one answer to both.

    `beside` as for `_broken_neighbour`.
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
