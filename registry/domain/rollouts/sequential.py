"""Tests of live figures that may be repeated after every request.

The figures are means of values from 0 to 1: whether a request failed, whether an answer was right. Against a mean p, n
values with the sum S are the evidence

    ln ∫ q^S (1-q)^(n-S) Beta(q; a, b) dq  -  ln p^S (1-p)^(n-S)

a mixture of likelihood ratios (Robbins, "Statistical methods related to the law of the iterated logarithm", 1970). If p
is the true mean, exp(evidence) is a supermartingale, also for values between 0 and 1, since a^x b^(1-x) is at most
x a + (1-x) b. By Ville's inequality it ever exceeds 1/alpha with a probability of at most alpha, however often somebody
looks. The evidence of two groups of requests adds up. This holds for every a and b chosen beforehand; those near the
mean that there will be find a difference sooner.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, lgamma, log

Prior = tuple[float, float]
"""a and b."""
ANY: Prior = (0.5, 0.5)
RARE: Prior = (0.5, 5.0)
"""For means that are mostly below a tenth, such as errors."""
_TINY = 1e-9


@dataclass(frozen=True, slots=True)
class Sample:
    """The number of values, and their sum."""

    n: int = 0
    total: float = 0.0

    @property
    def mean(self) -> float:
        return self.total / self.n if self.n else 0.0

    def plus(self, other: "Sample", sign: int = 1) -> "Sample":
        return Sample(self.n + sign * other.n, self.total + sign * other.total)

    @property
    def inverted(self) -> "Sample":
        """The sample of 1 - x."""
        return Sample(self.n, self.n - self.total)

    def evidence(self, mean: float, prior: Prior = ANY) -> float:
        """The evidence against a true mean, in nats; see above."""
        p = min(max(mean, _TINY), 1 - _TINY)
        wins, losses = self.total, self.n - self.total
        mixture = _log_beta(wins + prior[0], losses + prior[1]) - _log_beta(*prior)
        return mixture - wins * log(p) - losses * log(1 - p)


def above_limit(sample: Sample, limit: float, prior: Prior = ANY) -> float:
    """The evidence that the true mean is above the limit: that against each mean up to it."""
    return sample.evidence(limit, prior) if sample.mean > limit else -inf


def above_other(sample: Sample, other: Sample, margin: float, prior: Prior = ANY) -> float:
    """The evidence that the true mean is above that of the other sample plus the margin: the weakest evidence
    against a pair of means for which it is not."""
    if not sample.n or not other.n or sample.mean <= other.mean + margin:
        return -inf

    def of(mean: float) -> float:
        return other.evidence(mean, prior) + sample.evidence(mean + margin, prior)

    return _least(of, other.mean, sample.mean - margin)


def _least(of: Callable[[float], float], low: float, high: float) -> float:
    """The minimum of a convex function."""
    for _ in range(40):
        third = (high - low) / 3
        if of(low + third) < of(high - third):
            high -= third
        else:
            low += third
    return of((low + high) / 2)


def _log_beta(a: float, b: float) -> float:
    return lgamma(a) + lgamma(b) - lgamma(a + b)
