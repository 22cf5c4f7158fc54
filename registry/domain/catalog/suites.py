"""Suites, the scores recorded against them, and conditions on scores."""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from sqlalchemy import ColumnElement, select, true
from sqlalchemy.orm import Session

from composer.formats.recipes.weights import real
from registry.database.tables import Attestation, Base, Release, Score, SuiteVersion
from registry.database.tables.catalog import new_stamp
from registry.domain.access import audit, roles
from registry.domain.access.audit import Act, Actor
from registry.domain.access.roles import EVERYWHERE, Role, holds, readable, refuse_other_owner
from registry.domain.catalog import metrics
from registry.errors import Conflict, Invalid, NotAllowed, NotFound, Usage
from registry.formats.references import MAX_NEAR, nearest

_DIGEST = re.compile(r"[0-9a-f]{64}")
_CONDITION = re.compile(r"\s*([a-z0-9][a-z0-9._/-]*)\.([a-z_][a-z0-9_]*)\s*(>=|<=)\s*(\S+)\s*")

MAX_VALUE = 1e100
"""The largest value and standard error: the square of a larger one would not be finite."""
REPORTED = "reported"
HARNESS = "harness"
ELSEWHERE = {HARNESS: "a task of an evaluation harness", REPORTED: "a benchmark that scores are only reported of"}
"""Tasks of suites whose examples the registry does not have."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One metric of one suite; `stderr` in the units of `value`, `n` examples, 0 if a reported score does not state it.
    `results_sha256` is the stored blob with the results of each example. `source` is the harness that measured it and
    its version, or the file that reports it."""

    suite_digest: str
    metric: str
    value: float
    stderr: float | None
    n: int
    higher_is_better: bool
    results_sha256: str | None = None
    reported: bool = False
    source: str | None = None

    @classmethod
    def of(cls, score: Mapping[str, Any], results_sha256: str | None = None) -> Self:
        """Parses what a worker measured from the JSON of a score."""
        names = ("suite_digest", "metric", "value", "stderr", "n", "higher_is_better")
        source = score.get("source")
        return cls(**{name: score[name] for name in names}, results_sha256=results_sha256, source=source)


@dataclass(frozen=True, slots=True)
class Condition:
    """`SUITE.METRIC>=VALUE` or `<=`."""

    suite: str
    metric: str
    operator: str
    value: float

    def __str__(self) -> str:
        return f"{self.suite}.{self.metric} {self.operator} {number_text(self.value)}"

    def holds(self, value: float) -> bool:
        return value >= self.value if self.operator == ">=" else value <= self.value


def number_text(value: float) -> str:
    """The shortest text that parses to the same number."""
    return repr(value).removesuffix(".0")


def parse_condition(text: str) -> Condition:
    """Parses `SUITE.METRIC>=NUMBER` or `<=`. Raises Usage for anything else."""
    match = _CONDITION.fullmatch(text)
    if match:
        suite, metric, operator, number = match.groups()
        try:
            value = real(number)
        except ValueError:
            value = math.nan
        if math.isfinite(value):
            return Condition(suite, metric, operator, value)
    raise Usage("bad_condition", f"The condition {text[:120]!r} cannot be read.", subject=text[:120])


def with_examples(suite: SuiteVersion) -> SuiteVersion:
    """The suite, if the registry has its examples. Raises Usage for a task of a harness and for a benchmark of reported
    scores, which workers cannot run."""
    if suite.task in ELSEWHERE:
        raise Usage(
            "suite_elsewhere", f"{suite.name} has no examples here: it is {ELSEWHERE[suite.task]}.", subject=suite.name
        )
    return suite


def find(session: Session, text: str, reader: Actor | None = None) -> SuiteVersion:
    """Finds a suite by digest, by `NAME@VERSION`, or the current one by name. Its content is loaded lazily.

    A `reader` finds suites that they may read, or on which they may read a score. Only by such a score are benchmarks
    found whose scores are reported, since files of private releases name them.
    """
    suite = find_any(session, text)
    open_to_all = suite is not None and suite.task != REPORTED and (reader is None or may_read(reader, suite))
    if suite is None or not (open_to_all or (reader and metrics.has_readable_score(session, reader, suite))):
        raise NotFound(
            "suite_unknown",
            f"The suite {text!r} does not exist.",
            subject=text,
            next_step=nearest(text, _names(session, reader), "If it is new, add it with `adaptory suite add FILE`."),
        )
    return suite


def find_readable(session: Session, text: str, reader: Actor) -> SuiteVersion:
    """Like `find`, for the examples of a suite. Raises NotAllowed for one of another namespace that is not shared."""
    suite = find(session, text, reader)
    if not may_read(reader, suite):
        raise not_shared(suite)
    return suite


def not_shared(suite: SuiteVersion) -> NotAllowed:
    """The error for examples that the actor may not read."""
    why = f"{suite.name} is not shared: its examples are for those who may read {suite.namespace}."
    return NotAllowed("suite_private", why, subject=suite.name)


def may_read(actor: Actor, suite: SuiteVersion) -> bool:
    """Whether the actor may read the suite's examples."""
    return suite.namespace is None or suite.shared or roles.may_read(actor, suite.namespace)


def _is_readable(reader: Actor | None) -> ColumnElement[bool]:
    if reader is None:
        return true()
    return SuiteVersion.namespace.is_(None) | SuiteVersion.shared | readable(reader, SuiteVersion.namespace)


def find_any(session: Session, text: str) -> SuiteVersion | None:
    """Like `find`, with the benchmarks of reported scores; None if there is none."""
    name, at, version = text.partition("@")
    if _DIGEST.fullmatch(text):
        named = SuiteVersion.digest == text
    else:
        named = (SuiteVersion.name == name) & (SuiteVersion.version == version if at else SuiteVersion.current)
    return session.scalar(select(SuiteVersion).where(named))


def _names(session: Session, reader: Actor | None) -> list[str]:
    listed = select(SuiteVersion.name).where(SuiteVersion.current, SuiteVersion.task != REPORTED, _is_readable(reader))
    return list(session.scalars(listed.order_by(SuiteVersion.name).limit(MAX_NEAR)))


def refuse_unknown_metric(session: Session, actor: Actor, suite: str, metric: str) -> None:
    """Raises NotFound unless the metric is built in, stated by the suite, or the actor may read a score of it."""
    if not metrics.is_known(session, actor, find(session, suite, actor).name, metric):
        known = metrics.known(session, actor, suite)
        recorded = ", ".join(metrics.HIGHER_IS_BETTER)
        raise NotFound(
            "metric_unknown",
            f"No release that you may read has a score {suite}.{metric}.",
            subject=f"{suite}.{metric}",
            next_step=nearest(metric, known, f"{suite} has {', '.join(known)}; `adaptory eval` records {recorded}."),
        )


def list_page(session: Session, reader: Actor, *, after: int, limit: int) -> list[SuiteVersion]:
    """A page of current suites by id, from the first one after `after` on, whose examples the reader may read, without
    benchmarks of reported scores."""
    listed = select(SuiteVersion).where(SuiteVersion.id > after, SuiteVersion.current, SuiteVersion.task != REPORTED)
    return list(session.scalars(listed.where(_is_readable(reader)).order_by(SuiteVersion.id).limit(limit)))


def record(
    session: Session,
    actor: Actor,
    subject: Release | Base,
    measurements: Sequence[Measurement],
    attestation: Attestation | None = None,
) -> list[Score]:
    """Records scores, with the attestation of the worker that measured them. Recording again replaces a score; the
    audit row keeps the old value. Raises Conflict for a reported one in the place of a measured one."""
    if isinstance(subject, Base):
        refuse_other_owner(actor, f"base {subject.name}", subject.created_by)
    else:
        subject.stamp = new_stamp()
    rows: list[Score] = []
    used = [_of_measurement(session, measurement) for measurement in measurements]
    for measurement, suite in zip(measurements, used, strict=True):
        _check_measurement(measurement, suite)
        if suite.task != REPORTED:
            metrics.check(
                session, actor, suite, measurement.metric, measurement.higher_is_better, fixes=not measurement.reported
            )
        score = session.scalar(
            select(Score).where(_of(subject), Score.suite_id == suite.id, Score.metric == measurement.metric)
        )
        if score is not None and measurement.reported and not score.reported:
            raise Conflict(
                "score_measured",
                f"{suite.name}.{measurement.metric} of {_subject_name(subject)} is measured. A reported score does not "
                "replace it.",
                subject=f"{suite.name}.{measurement.metric}",
            )
        before = {"value": score.value, "n": score.n} if score else None
        score = score or Score(suite=suite, metric=measurement.metric, **_owner_columns(subject))
        score.value, score.stderr, score.n = measurement.value, measurement.stderr, measurement.n
        score.higher_is_better, score.reported = measurement.higher_is_better, measurement.reported
        score.results_sha256, score.source = measurement.results_sha256, measurement.source
        score.measured_at, score.measured_by = actor.at, actor.name
        score.attestation = attestation
        session.add(score)
        session.flush()
        audit.record(
            session,
            actor,
            Act.SCORE_RECORD,
            _subject_name(subject),
            namespace=subject.repository.namespace if isinstance(subject, Release) else None,
            before=before,
            after={"value": measurement.value, "n": measurement.n},
            suite=suite.name,
            metric=measurement.metric,
            **({"reported": True} if measurement.reported else {}),
            **({"source": measurement.source} if measurement.source else {}),
        )
        rows.append(score)
    return rows


def _of_measurement(session: Session, measurement: Measurement) -> SuiteVersion:
    """The suite of the measurement. Only scores read from a release's own files, which have no `n`, belong to
    benchmarks that `find` hides."""
    of_file = measurement.reported and measurement.n == 0
    suite = find_any(session, measurement.suite_digest) if of_file else None
    return suite or find(session, measurement.suite_digest)


def _check_measurement(measurement: Measurement, suite: SuiteVersion) -> None:
    """Raises Invalid for a score that cannot come from the suite. Reported values are in the units of their source."""
    open_range = (-math.inf, math.inf)
    least, most = open_range if suite.task == REPORTED else metrics.RANGES.get(measurement.metric, open_range)
    fewest = 0 if measurement.reported else 1
    in_range = least <= measurement.value <= most and abs(measurement.value) <= MAX_VALUE
    if not in_range or (measurement.stderr or 0) > MAX_VALUE or measurement.n < fewest:
        raise Invalid(
            "bad_score",
            f"The score {measurement.metric} = {measurement.value} on n = {measurement.n} is out of range.",
            subject=measurement.metric,
            next_step=f"Record a value from {max(least, -MAX_VALUE):g} to {min(most, MAX_VALUE):g} and an error up "
            f"to {MAX_VALUE:g}, measured on one or more examples.",
        )
    if measurement.n > suite.examples:
        raise Invalid(
            "bad_score",
            f"n = {measurement.n} is more than the {suite.examples} examples of {suite.name}.",
            subject=measurement.metric,
        )


def delete(session: Session, actor: Actor, subject: Release | Base, named: str, metric: str) -> Score:
    """Deletes a score; `named` is a suite's name, for its current content, or digest. The audit row keeps the value.

    Only for its recorder and admins: of the namespace, or of the registry for a base's score. Raises NotFound and
    NotAllowed.
    """
    suite, name = find(session, named, actor), _subject_name(subject)
    owned = select(Score).where(_of(subject), Score.suite_id == suite.id, Score.metric == metric)
    score = session.scalar(owned.with_for_update(of=Score))
    if score is None:
        raise NotFound("score_unknown", f"{name} has no score {suite.name}.{metric}.", subject=f"{suite.name}.{metric}")
    namespace = subject.repository.namespace if isinstance(subject, Release) else EVERYWHERE
    if score.measured_by != actor.name and not holds(actor, Role.ADMIN, namespace):
        raise NotAllowed(
            "not_yours",
            f"{score.measured_by} recorded {suite.name}.{metric} of {name}.",
            subject=f"{suite.name}.{metric}",
            next_step=f"Ask {score.measured_by} or an admin.",
        )
    before = {"value": score.value, "n": score.n, "measured_by": score.measured_by}
    session.delete(score)
    if isinstance(subject, Release):
        subject.stamp = new_stamp()
    session.flush()
    audit.record(
        session,
        actor,
        Act.SCORE_DELETE,
        name,
        namespace=namespace if isinstance(subject, Release) else None,
        before=before,
        suite=suite.name,
        metric=metric,
    )
    return score


def list_in(session: Session, namespace: str, *, limit: int) -> list[SuiteVersion]:
    """The current suites of a namespace, by name."""
    listed = select(SuiteVersion).where(SuiteVersion.namespace == namespace, SuiteVersion.current)
    return list(session.scalars(listed.order_by(SuiteVersion.name).limit(limit)))


def results_of(session: Session, subject: Release | Base, named: str, reader: Actor) -> str:
    """The digest of the blob with the results of each example on a suite that the reader may read, by name (its current
    content), `NAME@VERSION` or digest. Raises NotFound, and NotAllowed as `find_readable`."""
    suite = find_readable(session, named, reader)
    recorded = (_of(subject), Score.suite_id == suite.id, Score.results_sha256.is_not(None))
    sha256 = session.scalar(select(Score.results_sha256).where(*recorded).order_by(Score.metric).limit(1))
    if sha256 is None:
        raise NotFound(
            "results_unknown",
            f"{_subject_name(subject)} has no results by example on {suite.name}.",
            subject=suite.name,
            next_step=f"Record them: `adaptory eval REF --suite {suite.name}`.",
        )
    return sha256


def other_scores(
    session: Session, subject: Release | Base, used: Collection[SuiteVersion]
) -> dict[tuple[str, str], Score]:
    """The subject's newest score on a content of these suites other than this one, by suite and metric."""
    other = SuiteVersion.name.in_({suite.name for suite in used}) & SuiteVersion.id.not_in({suite.id for suite in used})
    query = select(Score).join(SuiteVersion).where(_of(subject), other).order_by(SuiteVersion.id)
    return {(score.suite.name, score.metric): score for score in session.scalars(query)}


def label(suite: SuiteVersion) -> str:
    """The label of a content in messages: its version, or else its digest."""
    return suite.version or suite.digest[:12]


def current_labels(session: Session, names: Collection[str]) -> dict[str, str]:
    """The label of each suite's current content, by name."""
    return {
        suite.name: label(suite)
        for suite in session.scalars(select(SuiteVersion).where(SuiteVersion.name.in_(names), SuiteVersion.current))
    }


def scores_of(session: Session, subject: Release | Base) -> list[Score]:
    """The scores on current suites, by suite and metric."""
    query = select(Score).join(SuiteVersion).where(_of(subject), SuiteVersion.current)
    return list(session.scalars(query.order_by(SuiteVersion.name, Score.metric)))


def scores_on(session: Session, subject: Release | Base, used: Collection[SuiteVersion]) -> list[Score]:
    """The scores on these contents of suites."""
    query = select(Score).where(_of(subject), Score.suite_id.in_({suite.id for suite in used}))
    return list(session.scalars(query))


def with_ids(session: Session, ids: Sequence[int]) -> list[Score]:
    """The scores with these ids that still exist, by suite and metric."""
    return list(
        session.scalars(
            select(Score).join(SuiteVersion).where(Score.id.in_(ids)).order_by(SuiteVersion.name, Score.metric)
        )
    )


def scores_of_bases(session: Session, *listed: Base) -> dict[str, list[Score]]:
    """Like `scores_of`, by base digest, with one query for a page of bases."""
    by_base: dict[str, list[Score]] = {base.digest: [] for base in listed}
    query = select(Score).join(SuiteVersion).where(Score.base_digest.in_(by_base), SuiteVersion.current)
    for score in session.scalars(query.order_by(SuiteVersion.name, Score.metric)):
        by_base[score.base_digest or ""].append(score)
    return by_base


def _of(subject: Release | Base) -> ColumnElement[bool]:
    return Score.release_id == subject.id if isinstance(subject, Release) else Score.base_digest == subject.digest


def _owner_columns(subject: Release | Base) -> dict[str, Any]:
    if isinstance(subject, Base):
        return {"base_digest": subject.digest}
    return {"release_id": subject.id, "traits_id": subject.traits_id}


def _subject_name(subject: Release | Base) -> str:
    if isinstance(subject, Base):
        return subject.digest
    return f"{subject.repository.namespace}/{subject.repository.name}:{subject.version}"
