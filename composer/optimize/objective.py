"""The objective of a search: every member keeps its effect, no guard rises, and the worst member counts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, isfinite

from composer.conflicts.evidence.outcome import LEAST_EXAMPLES, NOTICEABLE_NATS, Effect, Limits, Outcome
from composer.optimize.candidates import Candidate

LEAST_GAIN = 0.05
"""Nats per token: a smaller gain counts as this much, so that shares are not computed from noise around zero."""
ANSWERS_WEIGHT = 0.1
"""The weight of the retained share of exact matches relative to the share of the gain. At equal kept gain it chose .244
of the
answers instead of .197; on fewer than LEAST_EXAMPLES examples it is noise."""
TIE = 0.01
"""Within this much of the best, the simpler candidate wins."""


@dataclass(frozen=True, slots=True)
class CandidateResults:
    """A candidate and its results on the examples measured so far."""

    candidate: Candidate
    outcome: Outcome

    @property
    def kept(self) -> list[float]:
        """The share of each member's gain over the base that is left."""
        return [kept_share(effect) for effect in self.outcome.effects]

    def excess(self, limits: Limits) -> float:
        """By how much the worst value exceeds its limit, relative to that limit; 0 if all are kept, and infinite for
        nats that are not finite."""
        effects, guards = self.outcome.effects, self.outcome.guards
        if not all(isfinite(effect.combined) for effect in (*effects, *guards)):
            return inf
        allowed = [(effect.loss, effect.limit(limits)) for effect in effects] + [
            (guard.rise, limits.guard) for guard in guards
        ]
        values = [(value - limit) / max(abs(limit), NOTICEABLE_NATS) for value, limit in allowed if limit < inf]
        if self.outcome.k >= LEAST_EXAMPLES and limits.answers > 0:
            left = [effect.answers_left for effect in effects if effect.answers_left is not None]
            values += [1 - share / limits.answers for share in left]
        return max([0.0, *values])

    @property
    def value(self) -> float:
        """The worst member's kept share, and from LEAST_EXAMPLES examples on a little for its answers."""
        least = min(self.kept)
        if self.outcome.k < LEAST_EXAMPLES:
            return least
        left = [effect.answers_left for effect in self.outcome.effects if effect.answers_left is not None]
        return least + ANSWERS_WEIGHT * min(left, default=1.0)

    def rank(self, limits: Limits) -> tuple[float, float]:
        """A sort key of standings, best first: those within the limits by value, then the others by what they
        exceed."""
        return self.excess(limits), -self.value


def kept_share(effect: Effect) -> float:
    """(L_base - L) / max(L_base - L_alone, LEAST_GAIN): the share of the member's gain over the base that is left."""
    return (effect.base - effect.combined) / max(effect.base - effect.alone, LEAST_GAIN)


def best_first(standings: Sequence[CandidateResults], limits: Limits) -> list[CandidateResults]:
    """The standings, best first; equal ones keep their order."""
    return sorted(standings, key=lambda one: one.rank(limits))


def simplest_of_the_best(standings: Sequence[CandidateResults], limits: Limits) -> list[CandidateResults]:
    """The standings, best first, where of those within TIE of the best that is left the first in order wins.
    `standings` are in the order of simplicity."""
    left, chosen = list(standings), list[CandidateResults]()
    while left:
        first = best_first(left, limits)[0]
        if first.excess(limits):
            return chosen + best_first(left, limits)
        near = [standing for standing in left if not standing.excess(limits) and first.value - standing.value <= TIE]
        chosen.append(near[0])
        left.remove(near[0])
    return chosen


# A race: all candidates are measured on the same examples, the worse half leaves, the others get twice as many.
#
# Synchronised halving. On the study's 312 measured combinations it chose as well as measuring all of them, with a third
# of the examples; dropping candidates by their paired errors chose worse.

LEAST_KEPT = 3

Measure = Callable[[Candidate, int], CandidateResults | None]
"""(candidate, k) -> its standing on the first k search examples of each suite; None if it cannot be made."""

Ahead = Callable[[Sequence[Candidate], int], None]
"""(candidates, k): they are about to be measured, so their passes may be run beside each other now."""


def rungs(most: int) -> list[int]:
    """2, 4, 8, … up to `most`."""
    counts = [min(2, most)]
    while counts[-1] * 2 <= most:
        counts.append(counts[-1] * 2)
    return counts if counts[-1] == most else [*counts, most]


def race(
    candidates: Sequence[Candidate],
    measure: Measure,
    most: int,
    limits: Limits,
    affordable: Callable[[int], bool] = lambda _examples: True,
    ahead: Ahead = lambda _candidates, _k: None,
) -> list[list[CandidateResults]]:
    """Each rung's standings, best first; the last rung's are on `most` examples of each suite, unless the budget ended
    before. Empty if no candidate can be made. `affordable` is called with the number of candidates times added examples
    of a rung; the first rung is always run. `ahead` is called with the measurements that a rung will make."""
    runners, history, done = list(candidates), list[list[CandidateResults]](), 0
    for k in rungs(most):
        if history and not affordable(len(runners) * (k - done)):
            break
        ahead(runners, k)
        measured = [measure(candidate, k) for candidate in runners]
        standings = best_first([standing for standing in measured if standing is not None], limits)
        if not standings:
            break
        history.append(standings)
        kept = max(LEAST_KEPT, (len(standings) + 1) // 2)
        runners, done = [standing.candidate for standing in standings[:kept]], k
    return history
