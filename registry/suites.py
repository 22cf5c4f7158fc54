"""Suites, the scores recorded against them, and conditions on scores."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from composer.suite import Suite as SuiteContent
from registry import audit
from registry.access import readable_names, refuse_stranger
from registry.audit import Act, Actor
from registry.errors import Invalid, NotFound, Usage
from registry.models import Base, Release, Repository, Score, Suite
from registry.models.catalog import new_stamp
from registry.names import MAX_NEAR, nearest, parse_part

_DIGEST = re.compile(r"[0-9a-f]{64}")
_CONDITION = re.compile(r"\s*([a-z0-9][a-z0-9._-]*)\.([a-z_][a-z0-9_]*)\s*(>=|<=)\s*(\S+)\s*")


HIGHER_IS_BETTER = {"nll": False, "accuracy": True}
"""The direction of the metrics that we know; of others the one who records them must be believed."""
RANGES = {"nll": (0.0, math.inf), "accuracy": (0.0, 1.0)}
"""What their values can be."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One metric of one suite; `stderr` in the units of `value`, `n` examples."""

    suite_digest: str
    metric: str
    value: float
    stderr: float | None
    n: int
    higher_is_better: bool


@dataclass(frozen=True, slots=True)
class Condition:
    """`SUITE.METRIC>=VALUE` or `<=`."""

    suite: str
    metric: str
    operator: str
    value: float

    def __str__(self) -> str:
        return f"{self.suite}.{self.metric} {self.operator} {exact(self.value)}"

    def holds(self, value: float) -> bool:
        return value >= self.value if self.operator == ">=" else value <= self.value


def exact(value: float) -> str:
    """Reads back as the same number: a rule must be kept as it was written."""
    return repr(value).removesuffix(".0")


def parse_condition(text: str) -> Condition:
    match = _CONDITION.fullmatch(text)
    if match:
        suite, metric, operator, number = match.groups()
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if math.isfinite(value):
            return Condition(suite, metric, operator, value)
    raise Usage(
        "bad_condition",
        f"{text[:120]!r} is not a condition on a score.",
        subject=text[:120],
        next_step="Write SUITE.METRIC>=NUMBER or SUITE.METRIC<=NUMBER, as in sql-exact.accuracy>=0.5.",
    )


def add(session: Session, actor: Actor, content: SuiteContent) -> tuple[Suite, bool]:
    """The suite and whether it is new. The suite added last, also again, is the current one of its name."""
    parse_part(content.name, "suite name")
    known = session.scalar(select(Suite).where(Suite.digest == content.digest))
    if known is not None and known.current:
        return known, False
    replaced = session.scalar(select(Suite).where(Suite.name == content.name, Suite.current))
    refuse_stranger(actor, f"suite/{content.name}", replaced.created_by if replaced else None)
    session.execute(update(Suite).where(Suite.name == content.name).values(current=False))
    suite = known or Suite(
        name=content.name,
        digest=content.digest,
        kind=content.kind,
        examples=len(content.examples),
        content=content.to_json(),
        created_at=actor.at,
        created_by=actor.name,
    )
    suite.current = True
    session.add(suite)
    session.flush()
    audit.record(
        session,
        actor,
        Act.SUITE_ADD,
        f"suite/{content.name}",
        namespace=None,
        before={"digest": replaced.digest} if replaced else None,
        after={"digest": content.digest, "examples": len(content.examples)},
    )
    return suite, known is None


def find(session: Session, text: str) -> Suite:
    """By digest, or the current suite of that name. Its content is read when it is first asked for."""
    named = Suite.digest == text if _DIGEST.fullmatch(text) else (Suite.name == text) & Suite.current
    suite = session.scalar(select(Suite).where(named))
    if suite is None:
        raise NotFound(
            "suite_unknown",
            f"There is no suite {text!r}.",
            subject=text,
            next_step=nearest(text, _names(session), "Add it with `adaptory suite add FILE`."),
        )
    return suite


def _names(session: Session) -> list[str]:
    return list(session.scalars(select(Suite.name).where(Suite.current).order_by(Suite.name).limit(MAX_NEAR)))


def refuse_unknown_metric(session: Session, actor: Actor, suite: str, metric: str) -> None:
    """Raises NotFound unless `adaptory eval` records it, or some release that the actor may read has it: what
    others have measured in private is not told."""
    if metric in HIGHER_IS_BETTER:
        return
    measured = select(Score.id).where(Score.suite_id == find(session, suite).id, Score.metric == metric)
    measured = measured.join(Release, Release.id == Score.release_id)
    if (readable := readable_names(actor)) is not None:
        of_repository = Repository.id == Release.repository_id
        measured = measured.join(Repository, of_repository).where(Repository.namespace.in_(readable))
    if session.scalar(measured.limit(1)) is None:
        raise NotFound(
            "metric_unknown",
            f"No release that you may see has a score {suite}.{metric}.",
            subject=f"{suite}.{metric}",
            next_step=nearest(
                metric,
                HIGHER_IS_BETTER,
                f"`adaptory eval` records {' and '.join(HIGHER_IS_BETTER)}; `adaptory show REF` has others.",
            ),
        )


def list_page(session: Session, *, after: int, limit: int) -> list[Suite]:
    return list(session.scalars(select(Suite).where(Suite.id > after, Suite.current).order_by(Suite.id).limit(limit)))


def record(session: Session, actor: Actor, subject: Release | Base, measurements: Sequence[Measurement]) -> list[Score]:
    """Measuring again replaces a score; the audit row keeps what it replaced."""
    if isinstance(subject, Base):
        refuse_stranger(actor, f"base {subject.name}", subject.created_by)
    else:
        subject.stamp = new_stamp()
    rows: list[Score] = []
    used = [find(session, measurement.suite_digest) for measurement in measurements]
    if any(measurement.metric not in HIGHER_IS_BETTER for measurement in measurements):
        # The first score of a metric says what is better of it: who else records one waits, and sees what it said.
        rows_of = select(Suite.id).where(Suite.id.in_({suite.id for suite in used})).order_by(Suite.id)
        session.execute(rows_of.with_for_update(key_share=True))
    for measurement, suite in zip(measurements, used, strict=True):
        _check_measurement(session, measurement, suite)
        owner = Score.release_id == subject.id if isinstance(subject, Release) else Score.base_digest == subject.digest
        score = session.scalar(
            select(Score).where(owner, Score.suite_id == suite.id, Score.metric == measurement.metric)
        )
        before = {"value": score.value, "n": score.n} if score else None
        score = score or Score(suite=suite, metric=measurement.metric, **_owner_columns(subject))
        score.value, score.stderr, score.n = measurement.value, measurement.stderr, measurement.n
        score.higher_is_better = measurement.higher_is_better
        score.measured_at, score.measured_by = actor.at, actor.name
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
        )
        rows.append(score)
    return rows


def _check_measurement(session: Session, measurement: Measurement, suite: Suite) -> None:
    """Who records a score does not decide what can be measured, nor how many examples a suite has; what is better of a
    metric that is not known here says the first one."""
    least, most = RANGES.get(measurement.metric, (-math.inf, math.inf))
    if not math.isfinite(measurement.value) or not least <= measurement.value <= most or measurement.n < 1:
        raise Invalid(
            "bad_score",
            f"{measurement.metric} = {measurement.value} on n = {measurement.n} is not a score.",
            subject=measurement.metric,
            next_step=f"Record a finite value from {least:g} to {most:g}, measured on one example or more.",
        )
    better = is_higher_better(session, suite, measurement.metric, measurement.higher_is_better)
    doubts = {
        f"n = {measurement.n} is more than its {suite.examples} examples": measurement.n > suite.examples,
        f"higher_is_better is {better} for it here": measurement.higher_is_better != better,
    }
    if any(doubts.values()):
        why = " and ".join(doubt for doubt, holds in doubts.items() if holds)
        raise Invalid(
            "bad_score",
            f"{measurement.metric} is no score of {suite.name}: {why}.",
            subject=measurement.metric,
            next_step="Record what `adaptory eval` measured.",
        )


def is_higher_better(session: Session, suite: Suite, metric: str, unknown: bool = True) -> bool:
    """`unknown` where nothing says so yet."""
    if metric in HIGHER_IS_BETTER:
        return HIGHER_IS_BETTER[metric]
    of_metric = select(Score.higher_is_better).where(Score.suite_id == suite.id, Score.metric == metric)
    said = session.scalar(of_metric.limit(1))
    return unknown if said is None else said


def scores_of(session: Session, subject: Release | Base) -> list[Score]:
    """Of the current suites, by suite and metric."""
    owner = Score.release_id == subject.id if isinstance(subject, Release) else Score.base_digest == subject.digest
    return list(
        session.scalars(select(Score).join(Suite).where(owner, Suite.current).order_by(Suite.name, Score.metric))
    )


def scores_of_bases(session: Session, *listed: Base) -> dict[str, list[Score]]:
    """As `scores_of`, by the digest of each base; one query for a page of them."""
    found: dict[str, list[Score]] = {base.digest: [] for base in listed}
    query = select(Score).join(Suite).where(Score.base_digest.in_(found), Suite.current)
    for score in session.scalars(query.order_by(Suite.name, Score.metric)):
        found[score.base_digest or ""].append(score)
    return found


def _owner_columns(subject: Release | Base) -> dict[str, Any]:
    if isinstance(subject, Base):
        return {"base_digest": subject.digest}
    return {"release_id": subject.id, "traits_id": subject.traits_id}


def _subject_name(subject: Release | Base) -> str:
    if isinstance(subject, Base):
        return subject.digest
    return f"{subject.repository.namespace}/{subject.repository.name}:{subject.version}"
