"""Rules that a promotion or a composition must pass, and the judgement with its numbers.

sql-exact.accuracy >= 0.5                 the score itself
guard-general.nll within 0.1 of served    not worse than what the channel serves by more than 0.1
guard-general.nll within 0.1 of base      not worse than the base by more than 0.1
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry import audit, suites
from registry.audit import Act, Actor
from registry.errors import Usage
from registry.models import Base, Gate, Release, Repository, Score
from registry.names import parse_part
from registry.suites import Condition, exact, parse_condition

MAX_RULES = 50
_WITHIN = re.compile(
    r"\s*([a-z0-9][a-z0-9._-]*)\.([a-z_][a-z0-9_]*)\s+within\s+(\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)\s+of\s+(served|base)\s*"
)


@dataclass(frozen=True, slots=True)
class Within:
    """Not worse than the score of `other` by more than `margin`, in the units of the metric."""

    suite: str
    metric: str
    margin: float
    other: str

    def __str__(self) -> str:
        return f"{self.suite}.{self.metric} within {exact(self.margin)} of {self.other}"


Rule = Condition | Within


@dataclass(frozen=True, slots=True)
class Measured:
    """What a judgement needs of a score."""

    value: float
    stderr: float | None
    n: int
    higher_is_better: bool

    def __str__(self) -> str:
        error = f" ± {self.stderr:.3g}" if self.stderr is not None else ""
        return f"{self.value:.4g}{error} (n={self.n})"


Scores = Mapping[tuple[str, str], Measured]
"""By suite name and metric; only scores on the suite's current content."""


@dataclass(frozen=True, slots=True)
class GateResult:
    rule: str
    passed: bool
    detail: str

    def to_json(self) -> dict[str, Any]:
        return {"rule": self.rule, "passed": self.passed, "detail": self.detail}


def parse_rule(text: str) -> Rule:
    match = _WITHIN.fullmatch(text)
    if match and isfinite(float(match.group(3))):
        suite, metric, margin, other = match.groups()
        return Within(suite, metric, float(margin), other)
    try:
        return parse_condition(text)
    except Usage as error:
        raise Usage(
            "bad_rule",
            f"{text[:120]!r} is not a gate rule.",
            subject=text[:120],
            next_step="Write SUITE.METRIC>=NUMBER, SUITE.METRIC<=NUMBER or SUITE.METRIC within NUMBER of served|base.",
        ) from error


def parse_rules(texts: Sequence[str]) -> list[Rule]:
    if len(texts) > MAX_RULES:
        raise Usage("too_many_rules", f"A gate has at most {MAX_RULES} rules.", next_step="Leave some out.")
    return [parse_rule(text) for text in texts]


def judge(rules: Sequence[Rule], candidate: Scores, served: Scores | None, base: Scores) -> list[GateResult]:
    """A missing score fails its rule: what was not measured was not passed. `served` is None for an empty channel."""
    return [_judge(rule, candidate, served, base) for rule in rules]


def _judge(rule: Rule, candidate: Scores, served: Scores | None, base: Scores) -> GateResult:
    key = (rule.suite, rule.metric)
    own = candidate.get(key)
    if own is None:
        return GateResult(
            str(rule),
            False,
            f"no {rule.metric} on the current {rule.suite}: run `adaptory eval REF --suite {rule.suite}`",
        )
    if isinstance(rule, Condition):
        return GateResult(str(rule), rule.holds(own.value), str(own))
    if rule.other == "served" and served is None:
        return GateResult(str(rule), True, f"{own}; the channel serves nothing yet")
    other = (served if rule.other == "served" and served is not None else base).get(key)
    if other is None:
        return GateResult(
            str(rule),
            False,
            f"{own}, but the {rule.other} has no {rule.metric} on the current {rule.suite}: evaluate it first",
        )
    worse_by = (other.value - own.value) if own.higher_is_better else (own.value - other.value)
    change = f"worse by {worse_by:.4g}" if worse_by > 0 else f"better by {-worse_by:.4g}"
    # Decimal margins such as 0.1 have no exact binary form: a difference of just the margin passes.
    return GateResult(str(rule), worse_by <= rule.margin + 1e-9, f"{own} against {other}: {change}")


def set_rules(session: Session, actor: Actor, repository: Repository, channel: str, texts: Sequence[str]) -> list[Rule]:
    rules = parse_rules(texts)
    for rule in rules:
        suites.find(session, rule.suite)
        suites.refuse_unknown_metric(session, actor, rule.suite, rule.metric)
    row = session.get(Gate, (repository.id, parse_part(channel, "channel")))
    before = list(row.rules) if row else []
    row = row or Gate(repository_id=repository.id, channel=channel)
    row.rules = [str(rule) for rule in rules]
    session.add(row)
    session.flush()
    subject = f"{repository.namespace}/{repository.name}@{channel}"
    audit.record(
        session,
        actor,
        Act.GATE_SET,
        subject,
        namespace=repository.namespace,
        before={"rules": before},
        after={"rules": row.rules},
    )
    return rules


def all_rules(session: Session, repository: Repository) -> dict[str, list[Rule]]:
    rows = session.scalars(select(Gate).where(Gate.repository_id == repository.id).order_by(Gate.channel))
    return {row.channel: parse_rules(row.rules) for row in rows}


def scores(session: Session, subject: Release | Base) -> Scores:
    return {(row.suite.name, row.metric): measured(row) for row in suites.scores_of(session, subject)}


def measured(row: Score) -> Measured:
    return Measured(row.value, row.stderr, row.n, row.higher_is_better)
