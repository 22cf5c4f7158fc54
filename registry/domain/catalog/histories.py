"""The history of scores over the versions of a repository."""

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import exists, select
from sqlalchemy.orm import Session

from registry.database.tables import Release, Repository, Score, SuiteVersion


@dataclass(frozen=True, slots=True)
class Value:
    """A version's score on a suite, as plain columns, since a page draws hundreds."""

    version: str
    suite: str
    metric: str
    value: float
    stderr: float | None
    n: int


@dataclass(frozen=True, slots=True)
class VersionScore:
    """A version's score."""

    version: str
    created_at: datetime
    yanked: bool
    score: Score


def of_release(session: Session, release: Release, *, limit: int) -> list[Value]:
    """The scores of the newest `limit` releases of the repository that are not yanked, and of this one, on the current
    suites that this one is measured on, by suite and metric, guards last; then the lowest version first."""
    newest = select(Release.id).where(Release.repository_id == release.repository_id, ~Release.yanked)
    shown = {release.id, *session.scalars(newest.order_by(Release.sort_key.desc()).limit(limit))}
    own = select(Score.suite_id).where(Score.release_id == release.id)
    columns = (Release.version, SuiteVersion.name, Score.metric, Score.value, Score.stderr, Score.n)
    query = (
        select(*columns)
        .join(Release, Score.release_id == Release.id)
        .join(SuiteVersion, Score.suite_id == SuiteVersion.id)
    )
    wanted = query.where(Score.release_id.in_(shown), Score.suite_id.in_(own), SuiteVersion.current)
    ordered = wanted.order_by(SuiteVersion.kind == "guard", SuiteVersion.name, Score.metric, Release.sort_key)
    return [Value(*row) for row in session.execute(ordered)]


def newest_measured(session: Session, repository: Repository) -> Release | None:
    """The highest version that has a score."""
    has_score = exists().where(Score.release_id == Release.id)
    measured = select(Release).where(Release.repository_id == repository.id, has_score)
    return session.scalar(measured.order_by(Release.sort_key.desc()).limit(1))


def of_metric(session: Session, repository: Repository, score: Score, *, limit: int) -> list[VersionScore]:
    """The metric of a score over the repository's versions, yanked ones included, highest version first."""
    query = select(Release.version, Release.created_at, Release.yanked, Score)
    query = query.join(Release, Score.release_id == Release.id).where(
        Release.repository_id == repository.id, Score.suite_id == score.suite_id, Score.metric == score.metric
    )
    rows = session.execute(query.order_by(Release.sort_key.desc()).limit(limit))
    return [VersionScore(*row) for row in rows]
