"""Confidence intervals for means of few paired measurements (Student's t) and for shares. No torch."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from math import atan, ceil, cos, exp, inf, lgamma, log, log1p, pi, sin, sqrt
from statistics import NormalDist

from composer.conflicts.documents import IntervalDocument

CONFIDENCE = 0.95
_MANY = 200  # degrees of freedom from which the normal quantile is within 1 %


@dataclass(frozen=True, slots=True)
class Interval:
    """The range of a value. A single measurement leaves both ends open."""

    low: float
    high: float

    def holds(self, value: float) -> bool:
        return self.low <= value < self.high

    def to_json(self) -> IntervalDocument | None:
        """None if the interval is open: JSON has no infinity."""
        return None if inf in (-self.low, self.high) else {"low": self.low, "high": self.high}


def interval(value: float, stderr: float | None, n: int, claims: int = 1) -> Interval:
    """The interval around a mean of `n` measurements, wide enough that `claims` of them hold together 95 times in 100.

    Student's t with n - 1 degrees of freedom, at 1 - 0.05 / claims (Bonferroni). A bootstrap would be too narrow with
    so few values: for four, its 95 % percentile interval covers about 80 %.
    """
    if stderr is None or n < 2:
        return Interval(-inf, inf)
    t = quantile(1 - (1 - CONFIDENCE) / claims / 2, n - 1)
    return Interval(value - t * stderr, value + t * stderr)


def quantile(probability: float, dof: int) -> float:
    """The quantile of Student's t with `dof` degrees of freedom; `probability` is at least 0.5 and below 1."""
    if dof >= _MANY:
        return NormalDist().inv_cdf(probability)
    low, high = 0.0, 1.0
    while _below(high, dof) < probability:
        low, high = high, high * 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _below(middle, dof) < probability else (low, middle)
    return (low + high) / 2


def _below(t: float, dof: int) -> float:
    """P(T < t), t >= 0, as a finite sum (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    theta = atan(t / sqrt(dof))
    odd = dof % 2
    term, total = (cos(theta) if odd else 1.0), 0.0
    for k in range(1 + odd, dof, 2):
        total += term
        term *= cos(theta) ** 2 * k / (k + 1)
    between = (2 / pi) * (theta + sin(theta) * total) if odd else sin(theta) * total
    return 0.5 + between / 2


def share_interval(count: int, total: int) -> Interval:
    """The interval of the true share, given `count` of `total`: each end excludes it in at most 5 % of cases.

    Clopper and Pearson (Biometrika 26, 1934), never too narrow. Wilson's score interval is shorter, and its lower end
    excludes shares near 1 too often (Brown, Cai and DasGupta, Statistical Science 16, 2001): those are judged here.
    """
    if not total:
        return Interval(0.0, 1.0)
    tail = 1 - CONFIDENCE
    high = 1.0 if count == total else _bisected(lambda share: _at_most(count, total, share) > tail)
    low = 0.0 if count == 0 else _bisected(lambda share: 1 - _at_most(count - 1, total, share) < tail)
    return Interval(low, high)


def needed_for(share: float, lost: int = 0) -> int | None:
    """The fewest answers that, with `lost` of them lost, show that at least this share is left. None for 1: no number
    does."""
    if share <= 0 or share >= 1:
        return 0 if share <= 0 else None
    fewest = max(lost, ceil(log(1 - CONFIDENCE) / log(share)))
    return next(count for count in itertools.count(fewest) if _at_most(lost, count, 1 - share) <= 1 - CONFIDENCE)


def _bisected(below: Callable[[float], bool]) -> float:
    """The share between 0 and 1 up to which `below` is true."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) else (low, middle)
    return (low + high) / 2


def _at_most(count: int, total: int, share: float) -> float:
    """P(X <= count) for a binomial variable; `share` is between 0 and 1."""
    ways = [lgamma(total + 1) - lgamma(seen + 1) - lgamma(total - seen + 1) for seen in range(count + 1)]
    return sum(exp(log_ways + seen * log(share) + (total - seen) * log1p(-share)) for seen, log_ways in enumerate(ways))
