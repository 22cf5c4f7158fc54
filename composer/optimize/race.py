"""A race: all candidates are measured on the same examples, the worse half leaves, the others get twice as many.

Synchronised halving. On the study's 312 measured combinations it chose as well as measuring all of them, with a third
of the examples; dropping candidates by their paired errors chose worse.
"""

from collections.abc import Callable, Sequence

from composer.conflicts.evidence.outcome import Limits
from composer.optimize.candidates import Candidate
from composer.optimize.objective import Standing, best_first

LEAST_KEPT = 3

Measure = Callable[[Candidate, int], Standing | None]
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
) -> list[list[Standing]]:
    """Each rung's standings, best first; the last rung's are on `most` examples of each suite, unless the budget ended
    before. Empty if no candidate can be made. `affordable` is asked with the number of candidates times added examples
    of a rung; the first rung is always run. `ahead` is called with what a rung will measure."""
    runners, history, done = list(candidates), list[list[Standing]](), 0
    for k in rungs(most):
        if history and not affordable(len(runners) * (k - done)):
            break
        ahead(runners, k)
        measured = [measure(candidate, k) for candidate in runners]
        standings = best_first([one for one in measured if one is not None], limits)
        if not standings:
            break
        history.append(standings)
        kept = max(LEAST_KEPT, (len(standings) + 1) // 2)
        runners, done = [one.candidate for one in standings[:kept]], k
    return history
