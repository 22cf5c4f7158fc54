"""Gates: rules that a promotion or a composition must pass, and their evaluation.

sql-exact.accuracy >= 0.5                 the score itself
sql-exact.nll within 0.1 of served        not worse than what the channel serves by more than 0.1
guard-general.nll within 0.1 of base      not worse than the base by more than 0.1
sql-exact.nll within 0.1 of inputs        not worse than the best input of the composition by more than 0.1
sql-exact.accuracy keeps 0.9 of inputs    at least 0.9 of the best input's exact match

A guard measures what an adapter costs in general ability, so the base's score is shown beside it. While a channel
serves nothing, a rule that compares a guard with the served release uses the base instead.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from datetime import datetime
from math import isfinite
from typing import Any, ClassVar

from sqlalchemy import select
from sqlalchemy.orm import Session

from composer.formats.recipes.suite import score_cost
from registry.database.tables import Base, Release, ReleaseInput, Score, SuiteVersion
from registry.domain.access import namespaces
from registry.domain.access.audit import Actor
from registry.domain.catalog import metrics, suites
from registry.domain.catalog.suites import Condition, number_text, parse_condition
from registry.errors import Usage
from registry.formats import intervals
from registry.formats.channel_policy import Measured

MAX_RULES = 50
_SCORE = r"\s*(?P<suite>[a-z0-9][a-z0-9._/-]*)\.(?P<metric>[a-z_][a-z0-9_]*)\s+"


@dataclass(frozen=True, slots=True)
class GateScore:
    """The parts of a score that a gate needs; `n` is 0 if a reported one does not state it."""

    value: float
    stderr: float | None
    n: int
    higher_is_better: bool
    reported: bool = False
    by_worker: bool = False
    """Whether a worker measured and attested it."""

    def __str__(self) -> str:
        error = intervals.error_text(self.value, self.stderr, self.n, ".3g")
        notes = [f"n={self.n}"] * (self.n > 0) + ["reported"] * self.reported
        return f"{self.value:.4g}{error} ({', '.join(notes)})"

    def interval(self, metric: str) -> intervals.ScoreInterval | None:
        return intervals.interval(metric, self.value, self.stderr, self.n)

    def to_json(self) -> dict[str, Any]:
        return {"value": self.value, "stderr": self.stderr, "n": self.n}


@dataclass(frozen=True, slots=True)
class RuleFigures:
    """The numbers that a rule was judged by. `limit` is what the own score is compared with, once a margin or share has
    been applied to the `other` score; a rule `at_least` passes from the limit upwards, others up to it. `sure` tells
    whether the 95 % interval stays on its side of the limit. All but `own` are None where the rule compares nothing, or
    must not show the other score."""

    own: GateScore
    limit: float | None = None
    at_least: bool | None = None
    other: GateScore | None = None
    sure: bool | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            **self.own.to_json(),
            "higher_is_better": self.own.higher_is_better,
            "limit": self.limit,
            "at_least": self.at_least,
            "other": self.other.to_json() if self.other else None,
            "sure": self.sure,
        }


NO_FIGURES: Mapping[str, None] = dict.fromkeys(
    ("value", "stderr", "n", "higher_is_better", "limit", "at_least", "other", "sure")
)
"""For a rule that is not about a score, and for results recorded before figures existed."""


@dataclass(frozen=True, slots=True)
class Comparison(ABC):
    """A rule that compares a score with that of `other`: the release `served` by the channel, the `base`, or the best
    of the `inputs`. New subclasses are listed in COMPARISONS."""

    suite: str
    metric: str
    number: float
    other: str

    form: ClassVar[str]
    """The syntax, for messages."""
    pattern: ClassVar[re.Pattern[str]]
    """Has a group for each field."""

    @abstractmethod
    def __str__(self) -> str:
        """The text that parses to this rule."""

    @abstractmethod
    def judge(self, own: GateScore, other: GateScore) -> tuple[bool, str]:
        """Whether the rule passes, and why."""

    @abstractmethod
    def limit(self, other: GateScore) -> float | None:
        """The value from which on the rule passes; None if it cannot pass."""

    @property
    def slope(self) -> float:
        """The change of the limit per unit of the other score."""
        return 1.0


class Within(Comparison):
    """Not worse than the other score by more than a margin, in the units of the metric."""

    form = "SUITE.METRIC within NUMBER of served|base|inputs"
    pattern = re.compile(
        _SCORE + r"within\s+(?P<number>\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)\s+of\s+(?P<other>served|base|inputs)\s*",
        re.ASCII,
    )

    def __str__(self) -> str:
        return f"{self.suite}.{self.metric} within {number_text(self.number)} of {self.other}"

    def judge(self, own: GateScore, other: GateScore) -> tuple[bool, str]:
        worse_by = (other.value - own.value) if own.higher_is_better else (own.value - other.value)
        change = f"worse by {worse_by:.4g}" if worse_by > 0 else f"better by {-worse_by:.4g}"
        # Decimal margins such as 0.1 have no exact binary form: a difference equal to the margin passes.
        return worse_by <= self.number + 1e-9, f"{own} against {other}: {change}"

    def limit(self, other: GateScore) -> float:
        return other.value - self.number if other.higher_is_better else other.value + self.number


class Keeps(Comparison):
    """At least a share of the best input's score, for a metric where higher is better."""

    form = "SUITE.METRIC keeps SHARE of inputs"
    pattern = re.compile(_SCORE + r"keeps\s+(?P<number>0(?:\.\d+)?|1(?:\.0+)?)\s+of\s+(?P<other>inputs)\s*", re.ASCII)

    def __str__(self) -> str:
        return f"{self.suite}.{self.metric} keeps {number_text(self.number)} of {self.other}"

    def judge(self, own: GateScore, other: GateScore) -> tuple[bool, str]:
        if not own.higher_is_better:
            return False, f"{self.metric} is better when lower: write `within NUMBER of inputs`"
        share = f"{own.value / other.value:.0%} kept" if other.value > 0 else "the inputs have nothing to keep"
        return own.value >= self.number * other.value - 1e-9, f"{own} against {other}: {share}"

    def limit(self, other: GateScore) -> float | None:
        return self.number * other.value if other.higher_is_better else None

    @property
    def slope(self) -> float:
        return self.number


@dataclass(frozen=True, slots=True)
class ScoreConditions:
    """Conditions on every score that a rule uses: at least `min_n` examples, and not a `reported` one; with `worker`,
    only one that a worker attested."""

    min_n: int = 1
    measured: Measured = False

    def __str__(self) -> str:
        words = [f"n >= {self.min_n}"] * (self.min_n > 1)
        words += ["measured by a worker" if self.measured == "worker" else "measured"] * bool(self.measured)
        return f" ({', '.join(words)})" if words else ""

    def objection(self, score: GateScore) -> str:
        """The reason why the score does not count; empty if it does."""
        if self.measured and score.reported:
            return "it is reported, not measured"
        if self.measured == "worker" and not score.by_worker:
            return "no worker attests that it measured it"
        if self.min_n > 1 and not score.n:
            return f"n is not stated, and at least {self.min_n} are needed"
        return f"n = {score.n}, and at least {self.min_n} are needed" if 0 < score.n < self.min_n else ""

    def counting(self, scores: "Scores") -> "Scores":
        """The scores that count."""
        return {key: score for key, score in scores.items() if not self.objection(score)}


COMPARISONS: tuple[type[Comparison], ...] = (Within, Keeps)
Rule = Condition | Comparison


def compared_with(rule: Rule) -> str:
    """The subject of the score to compare with; empty for a condition on the score itself."""
    return rule.other if isinstance(rule, Comparison) else ""


Scores = Mapping[tuple[str, str], GateScore]
"""By suite name and metric; only scores on one content of each suite."""
Others = Mapping[tuple[str, str], str]
"""By suite name and metric, for scores on another content: a description of what was measured."""


@dataclass(frozen=True, slots=True)
class Contents:
    """The basis for judging rules: one content of each suite, by its name, and the pinned direction of metrics."""

    suites: Mapping[str, SuiteVersion]
    directions: Mapping[tuple[str, str], bool]

    def named(self, suite: str) -> str:
        """The name of the content in messages."""
        content = self.suites.get(suite)
        return f"the current {suite}" if content is None or content.current else f"{suite} {suites.label(content)}"

    def to_measure(self, suite: str) -> str:
        """The suite in the form that commands accept."""
        content = self.suites.get(suite)
        return suite if content is None or content.current else content.digest


CURRENT = Contents({}, {})


@dataclass(frozen=True, slots=True)
class GateResult:
    """The outcome of one rule; `detail` has the numbers in words, `figures` as numbers if the candidate has the score.
    `lacks` names the subject of the missing score: the `candidate`, `base`, `served` or `inputs`. A `waiting` rule does
    not pass yet, but may pass later without further action, at `until` if that is known. `policy` names the policy of a
    namespace that the rule is from, and is empty for the channel's own."""

    rule: str
    passed: bool
    detail: str
    lacks: str = ""
    waiting: bool = False
    until: datetime | None = None
    figures: RuleFigures | None = None
    policy: str = ""

    def to_json(self) -> dict[str, Any]:
        figures = self.figures.to_json() if self.figures else NO_FIGURES
        judged = {"rule": self.rule, "passed": self.passed, "detail": self.detail}
        return {**judged, **figures, "policy": self.policy or None}

    def with_waiting(self) -> dict[str, Any]:
        """The `to_json` document, with whether it waits."""
        return {**self.to_json(), "waiting": self.waiting}


def parse_rule(text: str) -> Rule:
    """Parses a gate rule: a condition, or one of `COMPARISONS`. Raises Usage for anything else."""
    for comparison in COMPARISONS:
        match = comparison.pattern.fullmatch(text)
        if match and isfinite(float(match["number"])):
            return comparison(match["suite"], match["metric"], float(match["number"]), match["other"])
    try:
        return parse_condition(text)
    except Usage as error:
        raise Usage(
            "bad_rule",
            f"{text[:120]!r} is not a valid gate rule.",
            subject=text[:120],
            next_step="Write SUITE.METRIC>=NUMBER, SUITE.METRIC<=NUMBER, "
            f"{' or '.join(comparison.form for comparison in COMPARISONS)}.",
        ) from error


def parse_rules(texts: Sequence[str]) -> list[Rule]:
    """Parses the rules of a gate. Raises Usage for more than MAX_RULES."""
    if len(texts) > MAX_RULES:
        raise Usage("too_many_rules", f"A gate has at most {MAX_RULES} rules.")
    return [parse_rule(text) for text in texts]


@dataclass(frozen=True, slots=True, kw_only=True)
class Baselines:
    """The scores that a candidate is compared with. `served` is None for an empty channel. `inputs` is the best input's
    score for each suite and metric, None without lineage. `guards` names the suites that are guards. With
    `hides_inputs`, results do not show the inputs' scores, only whether the rule passes: not every reader may read
    every input. `earlier` has
    scores on replaced contents, of the `candidate`, of `served` and of the `base`: rules compare one content only, and
    mention that a suite has moved on."""

    base: Scores
    served: Scores | None = None
    inputs: Scores | None = None
    hides_inputs: bool = False
    guards: Set[str] = frozenset()
    others: Mapping[str, Others] = field(default_factory=dict[str, Others])
    contents: Contents = CURRENT

    def moved_on(self, side: str, key: tuple[str, str]) -> str:
        """The remark of a message about a score on another content; otherwise empty."""
        other = self.others.get(side, {}).get(key)
        return f" (the suite has moved on: {other})" if other else ""

    def serves_base(self, rule: "Rule") -> bool:
        """Whether the rule compares a guard with a channel that serves nothing yet: users have the base."""
        return compared_with(rule) == "served" and self.served is None and rule.suite in self.guards


def best_of(members: Sequence[Scores]) -> Scores:
    """The best of the members' scores for each suite and metric."""
    best: dict[tuple[str, str], GateScore] = {}
    for key, own in (item for member in members for item in member.items()):
        known = best.get(key)
        if known is None or (own.value > known.value) == own.higher_is_better:
            best[key] = own
    return best


def judge(rules: Sequence[Rule], candidate: Scores, against: Baselines) -> list[GateResult]:
    """Evaluates the rules. A missing score fails its rule."""
    return [judge_rule(rule, candidate, against) for rule in rules]


def judge_rule(
    rule: Rule, candidate: Scores, against: Baselines, needs: ScoreConditions = ScoreConditions()
) -> GateResult:
    """Evaluates one rule on the scores that count."""
    if isinstance(rule, Comparison) and against.serves_base(rule):
        result = _judge(replace(rule, other="base"), candidate, against, needs)
        why = f"{result.detail}; the channel serves nothing yet, so the base counts"
        result = replace(result, rule=f"{rule}{needs}", detail=why)
    else:
        result = _judge(rule, candidate, against, needs)
    return _with_cost(rule, result, candidate, against)


def _with_cost(rule: Rule, result: GateResult, candidate: Scores, against: Baselines) -> GateResult:
    """The result, with the cost of a guard's loss relative to the base."""
    key = (rule.suite, rule.metric)
    own, base = candidate.get(key), against.base.get(key)
    if rule.suite not in against.guards or rule.metric != "nll" or own is None or base is None:
        return result
    return replace(result, detail=f"{result.detail}; {score_cost(own, base)}")


def _judge(rule: Rule, candidate: Scores, against: Baselines, needs: ScoreConditions) -> GateResult:
    key, text = (rule.suite, rule.metric), f"{rule}{needs}"
    own = candidate.get(key)
    if own is None:
        detail = f"no {rule.metric} on {against.contents.named(rule.suite)}{against.moved_on('candidate', key)}"
        command = f"adaptory eval REF --suite {against.contents.to_measure(rule.suite)}"
        return GateResult(text, False, f"{detail}: run `{command}`", lacks="candidate")
    alone = RuleFigures(own)
    if objection := needs.objection(own):
        return GateResult(text, False, f"{own}: {objection}", lacks="candidate", figures=alone)
    if isinstance(rule, Condition):
        sure = intervals.is_sure(own.value, own.interval(rule.metric), rule.value)
        figures = RuleFigures(own, rule.value, rule.operator == ">=", sure=sure)
        return GateResult(text, rule.holds(own.value), str(own), figures=figures)
    if rule.other == "served" and against.served is None:
        return GateResult(text, True, f"{own}; the channel serves nothing yet", figures=alone)
    if rule.other == "inputs" and against.inputs is None:
        detail = f"{own}; the release is not a composition and has no inputs to compare with"
        return GateResult(text, False, detail, figures=alone)
    scores = {"served": against.served, "inputs": against.inputs}.get(rule.other) or {}
    other = (against.base if rule.other == "base" else scores).get(key)
    if other is None:
        missing = "no input has" if rule.other == "inputs" else f"the {rule.other} has no"
        on = f"{against.contents.named(rule.suite)}{against.moved_on(rule.other, key)}"
        measure = f"{rule.metric} on {on}: evaluate it first"
        return GateResult(text, False, f"{own}, but {missing} {measure}", lacks=rule.other, figures=alone)
    if objection := needs.objection(other):
        detail = f"{own} against {other} of the {rule.other}: {objection}"
        return GateResult(text, False, detail, lacks=rule.other, figures=alone)
    passed, detail = rule.judge(own, other)
    if rule.other == "inputs" and against.hides_inputs:
        detail = f"{own}; the inputs' scores are not shown, since some are private"
        return GateResult(text, passed, detail, figures=alone)
    return GateResult(text, passed, detail, figures=_figures_of_comparison(rule, own, other))


def _figures_of_comparison(rule: Comparison, own: GateScore, other: GateScore) -> RuleFigures:
    limit, around = rule.limit(other), (other.value, other.interval(rule.metric))
    if limit is None:
        return RuleFigures(own)
    sure = intervals.is_sure(own.value, own.interval(rule.metric), limit, around, rule.slope)
    return RuleFigures(own, limit, own.higher_is_better, other, sure)


def lacking(rule: Rule, candidate: Scores, against: Baselines, needs: ScoreConditions) -> list[str]:
    """The subjects without a score that counts among those that the rule uses, named as in `GateResult.lacks`."""
    key, other = (rule.suite, rule.metric), compared_with(rule)
    other = "base" if against.serves_base(rule) else other
    compared = {"base": against.base, "served": against.served, "inputs": against.inputs}.get(other)
    used = {"candidate": candidate} | ({} if compared is None else {other: compared})
    return [name for name, scores in used.items() if key not in needs.counting(scores)]


def refuse_unknown(session: Session, actor: Actor, rule: Rule) -> None:
    """Raises NotFound for a rule on an unknown suite or metric, Usage for one that no release can pass, and NotAllowed
    for a suite that the actor may not read, since promotions are measured on it."""
    suite = suites.find_readable(session, rule.suite, actor)
    if suite.name != rule.suite:
        why = f"a digest is not a name. Rules are pinned to the content that {suite.name} has when they are set"
        raise _bad(rule, why, f"Write {suite.name}.{rule.metric}.")
    suites.refuse_unknown_metric(session, actor, rule.suite, rule.metric)
    refuse_keeping_losses(session, rule)


def refuse_impossible(rule: Rule, suite: SuiteVersion, needs: "ScoreConditions") -> None:
    """Raises Usage for a rule that no score on this content of its suite can pass."""
    if suite.task == suites.REPORTED:
        if needs.measured or needs.min_n > 1:
            asked = "a measured score" if needs.measured else f"{needs.min_n} examples"
            raise _bad(
                rule, f"scores of {suite.name} are only reported, and the rule requires {asked}", "Leave that out."
            )
        return
    if needs.min_n > suite.examples:
        raise _bad(rule, f"{needs.min_n} examples are needed, and {suite.name} has {suite.examples}", "Lower min_n.")
    if isinstance(rule, Condition) and (valid := metrics.RANGES.get(rule.metric)) is not None:
        least, most = valid
        if rule.value > most if rule.operator == ">=" else rule.value < least:
            raise _bad(rule, f"{rule.metric} is from {least:g} to {most:g}", "Write a number in this range.")


def _bad(rule: Rule, why: str, step: str) -> Usage:
    return Usage("bad_rule", f"{rule} can never pass: {why}.", subject=str(rule), next_step=step)


def refuse_keeping_losses(session: Session, rule: Rule) -> None:
    """Raises Usage for `keeps` on a metric where lower is better: no release would pass."""
    if isinstance(rule, Keeps) and not metrics.is_higher_better(session, rule.suite, rule.metric):
        raise Usage(
            "bad_rule",
            f"{rule}: {rule.metric} is better when lower.",
            subject=str(rule),
            next_step=f"Write {rule.suite}.{rule.metric} within NUMBER of inputs.",
        )


def inputs_of(session: Session, release: Release) -> list[Release] | None:
    """The releases that the release was composed from, None without lineage."""
    rows = session.scalars(select(ReleaseInput.input_id).where(ReleaseInput.release_id == release.id)).all()
    return [session.get_one(Release, row) for row in rows] if rows else None


def lineage_of(session: Session, release: Release) -> Iterator[Release]:
    """The release, and all that went into it, each once."""
    left, seen = [release], {release.id}
    while left:
        yield (one := left.pop())
        further = [source for source in inputs_of(session, one) or () if source.id not in seen]
        seen |= {source.id for source in further}
        left += further


def hides(session: Session, release: Release, inputs: Sequence[Release]) -> bool:
    """Whether any input is in a private namespace other than the release's own."""
    others = {source.repository.namespace for source in inputs} - {release.repository.namespace}
    return bool(others - namespaces.public_names(session))


def scores(session: Session, subject: Release | Base, contents: Contents | None = None) -> Scores:
    """The scores of a release or base on these contents, else on the current ones, by suite and metric."""
    if contents is None:
        return {(row.suite.name, row.metric): measured(row) for row in suites.scores_of(session, subject)}
    rows = {(row.suite.name, row.metric): row for row in suites.scores_on(session, subject, contents.suites.values())}
    return {
        key: replace(measured(row), higher_is_better=contents.directions.get(key, row.higher_is_better))
        for key, row in rows.items()
    }


def others(session: Session, subject: Release | Base, contents: Contents) -> Others:
    """The scores of a release or base on other contents of these suites, as messages name them."""
    rows = suites.other_scores(session, subject, contents.suites.values())
    return {
        key: f"{measured(row)} on {suites.label(row.suite)}, judged on {suites.label(contents.suites[key[0]])}"
        for key, row in rows.items()
    }


def measured(row: Score) -> GateScore:
    by_worker = row.worker is not None
    return GateScore(row.value, row.stderr, row.n, row.higher_is_better, row.reported, by_worker)
