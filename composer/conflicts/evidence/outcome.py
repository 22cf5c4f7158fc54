"""The effects of a combination on its members and guards, and whether they are acceptable.

Losses are judged by their intervals, and so is the share of answers that is left. A mean in nats cannot replace it: of
262 adapters, half of those that kept 0.8 to 0.9 of their gain in nats kept under 22 % of their answers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite

from composer.conflicts.documents import EffectDocument, GuardDocument, ProbeDocument
from composer.conflicts.evidence.interval import Interval, interval, share_interval
from composer.evaluation.measure import ExampleScore, ratio
from composer.findings import Verdict
from composer.formats.recipes.policy import THRESHOLDS, Policy

LEAST_EXAMPLES = 8
"""Fewer examples never show that something is harmless: one in twelve of the study's examples fails, and four
examples rarely include that one."""
LEAST_ANSWERED = 8
"""Examples that a member must answer word for word alone before the share that is left can show that it is unharmed.
With fewer, its loss decides."""
COVERAGE = {8: 0.95, 16: 0.96}
"""The share of pairs in which both members' 95 % intervals held, by examples per suite (docs/methods/study.md)."""
NOTICEABLE_NATS = 0.02
"""A loss below this many nats per token changes a token's probability by 2 %, which no reader would notice. No
interval of a loss is narrower than this on either side. One in twelve of the study's examples fails, and a few
uniform examples without a failure give far too narrow an interval. With this floor the intervals have their stated
coverage; what Student's t alone missed lay within it."""

_ROUNDING_NATS = 1e-5
"""A smaller difference may come from rounding: an example's last bits depend on the other examples in its pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The limits: a member's `loss` in nats per token (with `of_gain`, a share of its gain over the base, if
    noticeable); the least share of its `answers` that must be left (with `by_interval`, an interval that contains it
    leaves nothing open); and the rise of a `guard` in nats per token.
    """

    loss: float = 0.1
    answers: float = 0.9
    guard: float = 0.05
    of_gain: bool = False
    by_interval: bool = False

    @classmethod
    def of(cls, policy: Policy) -> "Limits":
        """The policy's limits; codes that the policy ignores have none."""

        def number(code: str, never: float) -> float:
            value = policy.thresholds.get(code, THRESHOLDS[code])
            return never if value is None or policy.ignores(code) else value

        return cls(
            loss=number("probe_loss", inf),
            answers=min(max(number("probe_answers", 0.0), 0.0), 1.0),
            guard=number("probe_guard", inf),
            of_gain="probe_loss" in policy.modes,
            by_interval="probe_answers" in policy.modes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """A member's own suite in nats per completion token, over `examples` examples: for the base, the member alone at
    weight 1, and the combination.

    `loss` is combined - alone, paired by example, with its standard error (None for one example) and its interval,
    which holds together with those of all members. The loss includes the effect of the member's own weight, which is
    also a choice. `alone_weighted` is the member alone at its given weight (None if that is 1), so combined -
    alone_weighted is what the others do. `kept` is the share of the member's gain that is left, (base - combined) /
    (base - alone); None if it had no gain. The member alone answers `answered` examples word for word; combined,
    `still_answered` of those.
    """

    member: str
    suite: str
    base: float
    alone: float
    combined: float
    loss: float
    loss_stderr: float | None
    loss_interval: Interval
    kept: float | None
    answered: int
    still_answered: int
    examples: int
    alone_weighted: float | None = None

    @property
    def weight_loss(self) -> float | None:
        """The loss from the member's own weight, in nats per token; None if that weight is 1."""
        return None if self.alone_weighted is None else self.alone_weighted - self.alone

    @property
    def answers_left(self) -> float | None:
        """The share of its answers that is left; None if it gave none alone."""
        return self.still_answered / self.answered if self.answered else None

    @property
    def answers_interval(self) -> Interval:
        """The interval of the share of its answers that is left."""
        return share_interval(self.still_answered, self.answered)

    @property
    def has_few_answers(self) -> bool:
        """Whether the member gives too few answers alone to judge it by them."""
        return self.answered < LEAST_ANSWERED

    def limit(self, limits: Limits) -> float:
        """The largest acceptable loss, in nats per token."""
        return max(NOTICEABLE_NATS, limits.loss * (self.base - self.alone)) if limits.of_gain else limits.loss

    def of_loss(self, limits: Limits) -> Verdict:
        """The verdict on the loss, by its interval."""
        limit = self.limit(limits)
        if self.loss_interval.low > limit or not isfinite(self.loss):
            return Verdict.WARN
        return Verdict.UNDECIDED if self.loss_interval.holds(limit) else Verdict.OK

    def of_answers(self, limits: Limits) -> Verdict:
        """The verdict on the answers, by the interval of the share that is left. With few answers only a sure loss
        counts."""
        sure = self.answers_interval
        if sure.high < limits.answers:
            return Verdict.WARN
        decided = sure.low >= limits.answers or limits.by_interval or self.has_few_answers
        return Verdict.OK if decided else Verdict.UNDECIDED

    def verdict(self, limits: Limits) -> Verdict:
        """The worst of the verdicts on loss and answers; at best undecided below LEAST_EXAMPLES examples."""
        enough = Verdict.OK if self.examples >= LEAST_EXAMPLES else Verdict.UNDECIDED
        return Verdict.worst([enough, self.of_loss(limits), self.of_answers(limits)])

    def surely_harmed(self, limits: Limits) -> bool:
        """Whether the member is harmed so clearly that more examples would not change it."""
        return Verdict.WARN in (self.of_loss(limits), self.of_answers(limits))

    def to_json(self) -> EffectDocument:
        return {
            "member": self.member,
            "suite": self.suite,
            "base": self.base,
            "alone": self.alone,
            "combined": self.combined,
            "loss": self.loss,
            "loss_stderr": self.loss_stderr,
            "loss_interval": self.loss_interval.to_json(),
            "kept": self.kept,
            "answered": self.answered,
            "still_answered": self.still_answered,
            "examples": self.examples,
            "alone_weighted": self.alone_weighted,
            "answers_interval": self.answers_interval.to_json() if self.answered else None,
        }

    def judged_json(self, limits: Limits) -> EffectDocument:
        """The `to_json` document, with the loss that is tolerated, None for any, the share of answers required, and the
        verdict."""
        return {
            **self.to_json(),
            "tolerated": _or_none(self.limit(limits)),
            "answers_required": limits.answers,
            "verdict": str(self.verdict(limits)),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class SideEffect:
    """A guard suite in nats per completion token. `rise` is combined minus the worst member alone, paired; `cost` is
    combined minus the base: what the combination costs in general ability, however much its members cost already."""

    suite: str
    base: float
    alone: dict[str, float]
    combined: float
    rise: float
    rise_stderr: float | None
    rise_interval: Interval
    examples: int

    def verdict(self, limits: Limits) -> Verdict:
        """The verdict by the interval; undecided below LEAST_EXAMPLES."""
        if self.rise_interval.low > limits.guard or not isfinite(self.rise):
            return Verdict.WARN
        few = self.examples < LEAST_EXAMPLES and limits.guard < inf
        return Verdict.UNDECIDED if few or self.rise_interval.holds(limits.guard) else Verdict.OK

    @property
    def cost(self) -> float:
        return self.combined - self.base

    def to_json(self) -> GuardDocument:
        return {
            "suite": self.suite,
            "base": self.base,
            "alone": dict(self.alone),
            "combined": self.combined,
            "cost": self.cost,
            "rise": self.rise,
            "rise_stderr": self.rise_stderr,
            "rise_interval": self.rise_interval.to_json(),
            "examples": self.examples,
        }

    def judged_json(self, limits: Limits) -> GuardDocument:
        """The `to_json` document, with the rise that is tolerated, None for any, and the verdict."""
        return {**self.to_json(), "tolerated": _or_none(limits.guard), "verdict": str(self.verdict(limits))}


@dataclass(frozen=True, slots=True)
class Outcome:
    """One combination measured on `k` examples per suite, or all of a smaller suite: the effect on each member and
    guard."""

    k: int
    effects: tuple[Effect, ...]
    guards: tuple[SideEffect, ...]

    @property
    def members(self) -> tuple[str, ...]:
        return tuple(effect.member for effect in self.effects)

    @property
    def worst(self) -> Effect:
        """The member with the largest loss; that loss, in nats per token, is the combination's risk."""
        return max(self.effects, key=lambda effect: effect.loss)

    @property
    def risk(self) -> Interval:
        """The interval of the worst member's loss. All members' intervals hold together, so the largest loss lies
        between their largest lower end and their largest upper end."""
        intervals = [effect.loss_interval for effect in self.effects]
        return Interval(max(interval.low for interval in intervals), max(interval.high for interval in intervals))

    def victim(self, limits: Limits) -> Effect:
        """The member with the worst verdict; among several, the one with the largest loss."""
        order = list(Verdict)
        return max(self.effects, key=lambda one: (order.index(one.verdict(limits)), one.loss))

    def verdict(self, limits: Limits) -> Verdict:
        """The worst verdict of all members and guards: `ok`, `undecided` or `warn`."""
        return Verdict.worst(effect.verdict(limits) for effect in (*self.effects, *self.guards))

    def is_open(self, limits: Limits) -> bool:
        """Whether any member or guard is undecided."""
        return any(effect.verdict(limits) is Verdict.UNDECIDED for effect in (*self.effects, *self.guards))

    def needs_more(self, limits: Limits) -> bool:
        """Whether more examples would help: something is undecided, a guard rose, or a member has given too few answers
        yet to be judged by them. Not if a member is surely harmed."""
        if any(effect.surely_harmed(limits) for effect in self.effects):
            return False
        risen = any(guard.rise > limits.guard for guard in self.guards)
        few = any(effect.answered and effect.has_few_answers for effect in self.effects) and limits.answers > 0
        return risen or few or self.verdict(limits) is not Verdict.OK

    def to_json(self, limits: Limits) -> ProbeDocument:
        return {
            "k": self.k,
            "effects": [effect.judged_json(limits) for effect in self.effects],
            "guards": [guard.judged_json(limits) for guard in self.guards],
        }


def effect_of(
    names: tuple[str, str],
    base: Sequence[ExampleScore],
    alone: Sequence[ExampleScore],
    combined: Sequence[ExampleScore],
    members: int,
    as_weighted: Sequence[ExampleScore] | None = None,
) -> Effect:
    """The effect on a member, from the same examples of its suite under each condition. The interval holds together
    with those of all `members` and is never narrower than NOTICEABLE_NATS on either side."""
    before, own, after = (_nll(run) for run in (base, alone, combined))
    loss, stderr = _difference(combined, alone)
    sure = interval(loss, stderr, len(alone), members)
    answered = [after for own, after in zip(alone, combined, strict=True) if own.exact]
    return Effect(
        member=names[0],
        suite=names[1],
        base=before,
        alone=own,
        combined=after,
        loss=loss,
        loss_stderr=stderr,
        loss_interval=Interval(min(sure.low, loss - NOTICEABLE_NATS), max(sure.high, loss + NOTICEABLE_NATS)),
        kept=(before - after) / (before - own) if before - own > _ROUNDING_NATS else None,
        answered=len(answered),
        still_answered=sum(result.exact for result in answered),
        examples=len(alone),
        alone_weighted=_nll(as_weighted) if as_weighted else None,
    )


def side_effect_of(
    suite: str,
    base: Sequence[ExampleScore],
    alone: Mapping[str, Sequence[ExampleScore]],
    combined: Sequence[ExampleScore],
    claims: int = 1,
) -> SideEffect:
    """The effect on a guard, from the same examples under the base, each member alone, and the combination. `claims`
    intervals hold together."""
    each = {name: _nll(run) for name, run in alone.items()}
    rise, stderr = _difference(combined, alone[max(each, key=lambda name: each[name])])
    n = len(base)
    return SideEffect(
        suite=suite,
        base=_nll(base),
        alone=each,
        combined=_nll(combined),
        rise=rise,
        rise_stderr=stderr,
        rise_interval=interval(rise, stderr, n, claims),
        examples=n,
    )


def _or_none(limit: float) -> float | None:
    """JSON has no infinity."""
    return limit if limit < inf else None


def _nll(measured: Sequence[ExampleScore]) -> float:
    return ratio([result.nats for result in measured], [result.tokens for result in measured])[0]


def _difference(after: Sequence[ExampleScore], before: Sequence[ExampleScore]) -> tuple[float, float | None]:
    """The paired difference in nats per token and its standard error. Examples differ far more than their losses do."""
    nats = [result.nats - other.nats for result, other in zip(after, before, strict=True)]
    return ratio(nats, [result.tokens for result in after])
