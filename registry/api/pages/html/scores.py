"""Scores as a release page shows them: compared with those of the previous release and of the base."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

from markupsafe import Markup

from composer.formats.recipes.recipe import TAMED_COST
from composer.formats.recipes.suite import LEAST_GUARD_EXAMPLES, score_cost
from registry.api.pages.html import drawings
from registry.api.pages.html.drawings import IntervalBar, ScorePoint
from registry.database.engine import Session
from registry.database.tables import Release
from registry.domain.catalog import histories as stored
from registry.domain.catalog.histories import Value
from registry.formats import intervals
from registry.wire.quality import ScoreOut


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreLine:
    """A metric of a suite: its values, and whether this release is `better` or `worse` than the previous one, `none
    shown` if the difference is within its error, or empty without a previous one. `cost` states in words how a guard
    compares with the base; `costly_guard` is its name if the adapter should be tamed."""

    name: str
    n: int
    reported: bool
    measured_by: str | None
    stated_by: str | None
    value: float
    before: float | None
    base: float | None
    cost: str
    costly_guard: str
    phrase: str | None
    comparison: str
    drawing: Markup

    @property
    def change(self) -> float | None:
        return None if self.before is None else self.value - self.before


VERSIONS, POINTS = 30, 150
"""The most versions in the history of a metric, the newest ones, and in that of all metrics, 20 kB. The history's own
page has the others."""


@dataclass(frozen=True, slots=True)
class History:
    """A metric over versions."""

    name: str
    versions: int
    drawing: Markup


def ends(metric: str, value: float, stderr: float | None, n: int) -> tuple[float, float]:
    """The 95 % interval of a score; the value itself without an error."""
    return intervals.interval(metric, value, stderr, n) or (value, value)


def interval(score: ScoreOut | Value) -> tuple[float, float]:
    return ends(score.metric, score.value, score.stderr, score.n)


def axis(metric: str, rows: Sequence[IntervalBar]) -> tuple[float, float]:
    """The ends of an axis that contains all rows: 0 to 1 for a share of examples."""
    if metric == "accuracy":
        return 0.0, 1.0
    return min(0.0, *(row.low for row in rows)), drawings.axis_end([row.high for row in rows])


def compare(now: ScoreOut, before: ScoreOut) -> str:
    """`better` or `worse` if the difference is beyond 1.96 of its unpaired standard error, else `none shown`."""
    if now.stderr is None or before.stderr is None:
        return "none shown"
    difference = now.value - before.value
    low, high = interval(now)
    other_low, other_high = interval(before)
    # Half widths of intervals, so that a share of 0 or 1 has an error too.
    error = sqrt(((high - low) / 2) ** 2 + ((other_high - other_low) / 2) ** 2)
    if abs(difference) <= error:
        return "none shown"
    return "better" if (difference > 0) == now.higher_is_better else "worse"


def lines(now: Sequence[ScoreOut], before: Sequence[ScoreOut], base: Sequence[ScoreOut]) -> list[ScoreLine]:
    """A line for each score of this release, in the order of suites; other scores count only if measured on the same
    content."""
    earlier, of_base = _by_key(before), _by_key(base)
    return [_line(score, earlier.get(_key(score)), of_base.get(_key(score))) for score in now]


def histories(session: Session, release: Release) -> list[History]:
    """The history of each metric over the versions of the repository, if others have it too."""
    series: dict[str, list[Value]] = {}
    for score in stored.of_release(session, release, limit=VERSIONS):
        series.setdefault(f"{score.suite}.{score.metric}", []).append(score)
    drawn: list[History] = []
    room = POINTS
    for name, points in series.items():
        own = any(score.version == release.version for score in points)
        if own and 1 < len(points) <= room:
            room -= len(points)
            drawn.append(_history(name, points, release.version))
    return drawn


def _history(name: str, points: Sequence[Value], shown: str) -> History:
    drawn = [
        ScorePoint(
            score.version,
            IntervalBar(score.value, *interval(score), "now" if score.version == shown else "before"),
            score.n,
        )
        for score in points
    ]
    return History(name, len(points), drawings.history(name, drawn))


def _line(score: ScoreOut, before: ScoreOut | None, base: ScoreOut | None) -> ScoreLine:
    given = [("base", base), ("before", before), ("now", score)]
    rows = [IntervalBar(stated.value, *interval(stated), kind) for kind, stated in given if stated is not None]
    low, high = axis(score.metric, rows)
    name = f"{score.suite}.{score.metric}"
    guards = base is not None and score.kind == "guard" and score.metric == "nll"
    cost = score_cost(score, base) if base is not None and guards else ""
    is_costly = base is not None and guards and score.n == base.n and score.value - base.value > TAMED_COST
    can_guard = score.n >= LEAST_GUARD_EXAMPLES
    return ScoreLine(
        name=name,
        n=score.n,
        reported=score.reported,
        measured_by=score.measured_by,
        stated_by=score.stated_by,
        value=score.value,
        before=None if before is None else before.value,
        base=None if base is None else base.value,
        cost=cost,
        costly_guard=score.suite if is_costly and can_guard else "",
        phrase=score.phrase,
        comparison="" if before is None else compare(score, before),
        drawing=drawings.intervals(name, rows, low, high),
    )


def _key(score: ScoreOut) -> tuple[str, str]:
    return score.suite_digest, score.metric


def _by_key(scores: Sequence[ScoreOut]) -> dict[tuple[str, str], ScoreOut]:
    return {_key(score): score for score in scores}
