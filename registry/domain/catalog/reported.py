"""Scores reported by a release's own files. They are recorded as reported, and never replace a measured score.

A data set with the name of a suite of this registry refers to that suite, unless the file states a revision that is
neither the suite's current version nor its digest. Any other data set gets a suite of its own, `reported-…`, without
owner or
examples.
"""

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from composer.findings import Finding
from composer.formats.checkpoints.reported import ReportedScore, doubt
from composer.formats.recipes.elsewhere import ReportedBenchmark
from composer.formats.recipes.suite import NAME
from registry.database.tables import Release, Score, SuiteVersion
from registry.domain.access.audit import Actor
from registry.domain.catalog import suite_registration, suites
from registry.domain.catalog.suites import Measurement
from registry.errors import Conflict, Invalid


def record(
    session: Session, actor: Actor, release: Release, reported: Sequence[ReportedScore]
) -> tuple[list[Score], list[Finding]]:
    """Records the scores; returns the recorded ones, and a warning for each of the others."""
    rows: list[Score] = []
    doubts: list[Finding] = []
    for score in reported:
        named = f"{score.source}: {score.metric} = {score.value:g} of {score.dataset}"
        try:
            suite = _suite(session, actor, score)
            if _is_measured(session, release, suite, score.metric):
                doubts.append(doubt(score.source, f"{named} is not kept: {suite.name}.{score.metric} is measured."))
                continue
            rows += suites.record(session, actor, release, [_measurement(suite, score)])
        except (Conflict, Invalid) as error:
            doubts.append(doubt(score.source, f"{named} is not kept: {error.detail}"))
    return rows, doubts


def _suite(session: Session, actor: Actor, reported: ReportedScore) -> SuiteVersion:
    """The suite of the score. Raises Conflict for another revision of a suite of this registry."""
    if own := _own_suite(session, actor, reported.dataset):
        if reported.revision not in (None, own.version, own.digest):
            raise Conflict(
                "suite_moved_on",
                f"It was measured on revision {reported.revision}, and {own.name} is now {suites.label(own)}.",
                subject=own.name,
            )
        return own
    benchmark = ReportedBenchmark(dataset=reported.dataset, config=reported.config, split=reported.split)
    return suite_registration.add_reported(session, actor, benchmark)


def _own_suite(session: Session, actor: Actor, dataset: str) -> SuiteVersion | None:
    """The current suite of exactly that name, if the actor may read it; None for one that was made for reported
    scores."""
    suite = suites.find_any(session, dataset) if NAME.fullmatch(dataset) else None
    return suite if suite and suite.task != suites.REPORTED and suites.may_read(actor, suite) else None


def _is_measured(session: Session, release: Release, suite: SuiteVersion, metric: str) -> bool:
    of_metric = (Score.release_id == release.id, Score.suite_id == suite.id, Score.metric == metric)
    return session.scalar(select(Score.id).where(*of_metric, ~Score.reported)) is not None


def _measurement(suite: SuiteVersion, reported: ReportedScore) -> Measurement:
    revision = f", revision {reported.revision}" if reported.revision else ""
    return Measurement(
        suite_digest=suite.digest,
        metric=reported.metric,
        value=reported.value,
        stderr=None,
        n=0,
        higher_is_better=reported.higher_is_better,
        reported=True,
        source=f"{reported.source}{revision}"[:300],
    )
