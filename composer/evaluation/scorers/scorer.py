"""What scores an answer: one of Adaptory's scorers, or one by entry point that the operator has enabled."""

from collections.abc import Callable, Collection, Mapping
from importlib.metadata import entry_points
from math import isfinite
from typing import Any, Protocol

from composer.errors import InvalidFile, NotSupported
from composer.evaluation.scorers.json_match import JsonMatch
from composer.evaluation.scorers.match import TextMatch
from composer.formats.recipes.suite import Example
from composer.formats.recipes.tasks import JsonSettings, MatchSettings, ScorerChoice

GROUP = "adaptory.scorers"
"""The group of entry points: each is called with the suite's settings as keywords, and returns a scorer."""


class Scorer(Protocol):
    """Scores one answer after the other."""

    def __call__(self, answer: str, example: Example) -> float:
        """From 0, wrong, to 1, right. The same answer has the same score. Whatever the answer is, the call ends within
        bounds of the scorer's own, raises nothing, and changes nothing outside."""
        ...


_BUILT_IN: Mapping[str, Callable[[dict[str, Any]], Scorer]] = {
    "match": lambda settings: TextMatch(MatchSettings(**settings)),
    "json": lambda settings: JsonMatch(JsonSettings(**settings)),
}


def scorer_named(chosen: ScorerChoice, enabled: Collection[str]) -> Scorer:
    """The scorer of that name. Raises NotSupported for a Python scorer that is not `enabled` or not installed, and
    InvalidFile for settings that it does not take."""
    if chosen.name in _BUILT_IN:
        return _BUILT_IN[chosen.name](chosen.settings)
    if chosen.name not in enabled:
        raise NotSupported(
            "scorer_disabled",
            f"The scorer {chosen.name} is Python code, which is not enabled here.",
            subject=chosen.name,
            next_step=f"If you trust it, install it and set ADAPTORY_SCORERS={','.join([*enabled, chosen.name])}.",
        )
    known = entry_points(group=GROUP)
    if chosen.name not in known.names:
        raise NotSupported(
            "scorer_missing",
            f"No installed package has a scorer {chosen.name} (entry points {GROUP}).",
            subject=chosen.name,
            next_step=f"Install its package; installed are {', '.join(sorted(known.names)) or 'none'}.",
        )
    make: Callable[..., Scorer] = known[chosen.name].load()
    try:
        return make(**chosen.settings)
    except (TypeError, ValueError) as error:
        raise InvalidFile(
            "scorer_settings",
            f"The scorer {chosen.name} does not take these settings: {error}",
            subject=chosen.name,
            next_step="Correct `scorer.settings` in the suite.",
        ) from error


def checked_score(scorer: Scorer, name: str, answer: str, example: Example) -> float:
    """The answer's score. Raises NotSupported if the scorer fails or returns something else: a score that was not
    measured must not be recorded as 0."""
    try:
        score = float(scorer(answer, example))
    except (Exception, SystemExit) as error:
        raise _failed(name, f"{type(error).__name__}: {error}") from error
    if not isfinite(score) or not 0 <= score <= 1:
        raise _failed(name, f"it returned {score}, which is not from 0 to 1")
    return score


def _failed(name: str, why: str) -> NotSupported:
    return NotSupported(
        "scorer_failed",
        f"The scorer {name} failed: {why[:500]}.",
        subject=name,
        next_step="Correct the scorer: it must give every answer a score from 0 to 1.",
    )
