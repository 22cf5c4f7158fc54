"""95 % intervals of scores."""

from math import hypot, sqrt

Z = 1.96
"""95 % of a normal distribution lie within this number of standard errors."""
ScoreInterval = tuple[float, float]


def interval(metric: str, value: float, stderr: float | None, n: int) -> ScoreInterval | None:
    """The 95 % interval of a score: Wilson's for `accuracy`, a share of `n` examples, which also holds at 0 and 1;
    otherwise the normal one. None for a score without an error."""
    if stderr is None:
        return None
    if metric == "accuracy" and n and 0 <= value <= 1:
        return wilson(value, n)
    return value - Z * stderr, value + Z * stderr


def wilson(share: float, n: int) -> ScoreInterval:
    """Wilson's 95 % interval of a share of `n` examples: 0 of 24 leaves 0 to 0.14."""
    centre = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z * sqrt(share * (1 - share) / n + Z * Z / (4 * n * n)) / (1 + Z * Z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def error_text(value: float, stderr: float | None, n: int, form: str) -> str:
    """The text after a value: its standard error, or Wilson's interval if none or all of `n` examples count, whose
    standard error is 0 although the share is not certain. Empty without an error. `form` is that of a number."""
    if stderr is None:
        return ""
    if stderr == 0 and n and value in (0, 1):
        low, high = wilson(value, n)
        return f" [{low:{form}}, {high:{form}}]"
    return f" ± {stderr:{form}}"


def is_sure(
    value: float,
    own: ScoreInterval | None,
    limit: float,
    other: tuple[float, ScoreInterval | None] | None = None,
    slope: float = 0.0,
) -> bool | None:
    """Whether the value is farther from the limit than their error. `own` is the value's interval. `other` is another
    score with its interval: the limit moves by `slope` for each unit of that score. None if an interval is missing.

    The half widths that face each other are combined as the root of the sum of squares (Newcombe's interval of a
    difference), since the scores are not paired.
    """
    if own is None:
        return None
    above = value > limit
    error = value - own[0] if above else own[1] - value
    if other is not None:
        centre, around = other
        if around is None:
            return None
        error = hypot(error, slope * (around[1] - centre if above else centre - around[0]))
    return abs(value - limit) > error
