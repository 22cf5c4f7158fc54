"""Two models compared example by example on the same suite. No torch.

Answers that are right or wrong: the score interval of the difference of two paired shares (Tango, Statistics in
Medicine 17, 1998), which excludes 0 exactly if McNemar's test finds a difference. It is the one that Fagerland,
Lydersen and Laake (Statistics in Medicine 33, 2014) recommend, and does not collapse where few examples differ. The
rest: a paired bootstrap over the examples. It is studentized (Efron and Tibshirani, An Introduction to the Bootstrap,
section 12.5): of six examples, a percentile interval covers the truth too rarely.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
POWER = 0.8
RESAMPLES = 4_000
_SEED = 0
_FEW, _MANY = 5, 2_000
"""With fewer examples a resample often has only one of them: the interval is open. With more it is the normal one."""
MAX_NEEDED = 1_000_000
"""Above this number of examples none is named."""
_Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
_Z_POWER = _Z + NormalDist().inv_cdf(POWER)

Values = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """New minus old on `n` common examples, with its interval, None where too few leave it open. `gained` and `lost`
    count the examples that are better and worse under the new model.

    `verdict` is better, worse or undecided. `needed` is the number of examples with which a difference of this size
    would be found four times in five; None if it is decided, if no difference was seen, or above MAX_NEEDED.
    """

    n: int
    difference: float
    low: float | None
    high: float | None
    gained: int
    lost: int
    verdict: str
    needed: int | None

    def to_json(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in self.__slots__}


def compare_scores(old: Sequence[float], new: Sequence[float]) -> Paired:
    """Compares the scores of the answers; higher is better."""
    change = np.asarray(new, dtype=np.float64) - np.asarray(old, dtype=np.float64)
    counts = int((change > 0).sum()), int((change < 0).sum())
    binary = {*old, *new} <= {0.0, 1.0}
    interval = share_difference_interval(*counts, len(change)) if binary else _mean_interval(change)
    return _paired(change, interval, counts, higher_is_better=True)


def compare_losses(old: Sequence[tuple[float, int]], new: Sequence[tuple[float, int]]) -> Paired:
    """Compares total nats over total tokens, of (nats, tokens) of each example; lower is better. An example's part of
    the difference is that of the linearised ratios (see `ratio` in measure.py)."""
    before, after = np.asarray(old, dtype=np.float64), np.asarray(new, dtype=np.float64)
    parts = _parts(after) - _parts(before)
    own = after[:, 0] / after[:, 1] - before[:, 0] / before[:, 1]
    counts = int((own < 0).sum()), int((own > 0).sum())
    return _paired(parts, _mean_interval(parts), counts, higher_is_better=False)


def _parts(measured: Values) -> Values:
    """Numbers whose mean is total nats over total tokens, and whose spread is that of this ratio."""
    nats, tokens = measured[:, 0], measured[:, 1]
    rate = nats.sum() / tokens.sum()
    return rate + (nats - rate * tokens) / tokens.mean()


def share_difference_interval(gained: int, lost: int, n: int) -> tuple[float, float]:
    """The interval of (gained - lost) / n: all true differences that Tango's score test does not reject."""
    seen = (gained - lost) / n

    def distance(true: float) -> float:
        a, b = 2 * n, (2 * n - gained + lost) * true - gained - lost
        share = (sqrt(max(0.0, b * b - 4 * a * (-lost * true * (1 - true)))) - b) / (2 * a)
        variance = n * (2 * share + true * (1 - true))
        return (gained - lost - n * true) / sqrt(variance) if variance > 0 else 0.0

    low = -1.0 if distance(-1 + 1e-12) <= _Z else _crossing(lambda true: distance(true) - _Z, -1.0, seen)
    high = 1.0 if distance(1 - 1e-12) >= -_Z else _crossing(lambda true: distance(true) + _Z, seen, 1.0)
    return low, high


def _crossing(falls: Callable[[float], float], low: float, high: float) -> float:
    """The point at which a falling function crosses 0."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if falls(middle) > 0 else (low, middle)
    return (low + high) / 2


def _mean_interval(parts: Values) -> tuple[float, float] | None:
    """The interval of the parts' mean; None if there are too few. The same parts always have the same interval."""
    n, mean = len(parts), float(parts.mean())
    if n < _FEW:
        return None
    error = float(parts.std()) / sqrt(n)
    if n >= _MANY:
        return mean - _Z * error, mean + _Z * error
    drawn = parts[np.random.default_rng(_SEED).integers(0, n, (RESAMPLES, n))]
    errors = drawn.std(-1) / sqrt(n)
    distances = (drawn.mean(-1) - mean)[errors > 0] / errors[errors > 0]
    if not distances.size:  # all parts are the same
        return mean, mean
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(distances, [tail, 1 - tail])
    return mean - float(high) * error, mean - float(low) * error


def _paired(
    parts: Values, interval: tuple[float, float] | None, counts: tuple[int, int], *, higher_is_better: bool
) -> Paired:
    n, difference, spread = len(parts), float(parts.mean()), float(parts.std())
    low, high = interval or (None, None)
    decided = low is not None and high is not None and (low > 0 or high < 0)
    verdict = "undecided" if not decided else "better" if (difference > 0) == higher_is_better else "worse"
    needed = None
    if not decided and difference and spread:
        wanted = max(n + 1, ceil((_Z_POWER * spread / difference) ** 2))
        needed = wanted if wanted <= MAX_NEEDED else None
    return Paired(
        n=n, difference=difference, low=low, high=high, gained=counts[0], lost=counts[1], verdict=verdict, needed=needed
    )


def describe(paired: Paired) -> str:
    """The verdict in words: `cannot tell at n = 120; about 900 would tell`."""
    if paired.verdict != "undecided":
        return paired.verdict
    if not paired.gained and not paired.lost:
        return f"the same on all {paired.n} examples"
    if paired.needed is None:
        return f"cannot tell at n = {paired.n}"
    digits = 10 ** max(0, len(str(paired.needed)) - 2)
    return f"cannot tell at n = {paired.n}; about {-(-paired.needed // digits) * digits:,} would tell"
