"""Scorers of answers: Adaptory's own, and those by entry point that the operator has enabled."""

import unicodedata
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoints, entry_points
from math import isfinite
from typing import Any, Protocol

from composer.errors import InvalidFile, NotSupported
from composer.evaluation.scorers.json_match import JsonMatch
from composer.formats.recipes.suite import Example
from composer.formats.recipes.tasks import JsonSettings, MatchSettings, ScorerChoice


# Text that is the same but for its writing.
@dataclass(frozen=True, slots=True)
class TextMatch:
    """1 if answer and completion are the same text after normalization, else 0."""

    settings: MatchSettings

    def __call__(self, answer: str, example: Example) -> float:
        return float(normalized(answer, self.settings) == normalized(example.completion, self.settings))


def normalized(text: str, settings: MatchSettings) -> str:
    """The text in Unicode's form NFKC, with single spaces; in one case, and without punctuation, unless they count."""
    text = unicodedata.normalize("NFKC", text)
    if not settings.case:
        text = text.casefold()
    if not settings.punctuation:
        text = "".join(character for character in text if not unicodedata.category(character).startswith("P"))
    return " ".join(text.split())


GROUP = "adaptory.scorers"
"""The group of entry points: each is called with the suite's settings as keywords, and returns a scorer."""


LIMIT_S = 30.0


@dataclass(frozen=True, slots=True)
class PythonScorers:
    """The Python scorers that the operator has enabled, and the seconds allowed for each example."""

    names: Collection[str] = ()
    limit_s: float = LIMIT_S


NO_PYTHON = PythonScorers()


class Scorer(Protocol):
    """Scores one answer after the other."""

    def __call__(self, answer: str, example: Example) -> float:
        """The score from 0, wrong, to 1, right. The same answer has the same score. For any answer the call ends within
        the scorer's own bounds, raises nothing, and has no side effects."""
        ...


class ScorerFailure(Exception):
    """A scorer in another process failed, on `example` unless that is None; the message has the reason."""

    example: Example | None = None


class ScorerTimeout(ScorerFailure):
    """A scorer took longer than its limit, in seconds, and is ended."""

    def __init__(self, limit_s: float) -> None:
        super().__init__(f"it took longer than {limit_s:g} s")
        self.limit_s = limit_s


def prompt_of(example: Example) -> str:
    return f"{example.prompt[:60]!r}"


BUILT_IN: Mapping[str, Callable[[dict[str, Any]], Scorer]] = {
    "match": lambda settings: TextMatch(MatchSettings(**settings)),
    "json": lambda settings: JsonMatch(JsonSettings(**settings)),
}


def scorer_named(chosen: ScorerChoice, enabled: Collection[str]) -> Scorer:
    """The scorer of that name, in this process. Raises NotSupported for a Python scorer that is not `enabled` or not
    installed, and InvalidFile for settings that it does not accept."""
    if chosen.name in BUILT_IN:
        return BUILT_IN[chosen.name](chosen.settings)
    make: Callable[..., Scorer] = installed_scorers(chosen.name, enabled)[chosen.name].load()
    try:
        return make(**chosen.settings)
    except (TypeError, ValueError) as error:
        raise settings_refused(chosen.name, str(error)) from error


def settings_refused(name: str, why: str) -> InvalidFile:
    return InvalidFile("scorer_settings", f"The scorer {name} does not accept these settings: {why}", subject=name)


def installed_scorers(name: str, enabled: Collection[str]) -> EntryPoints:
    """The installed scorers. Raises NotSupported if that of this name is not enabled, or not among them."""
    if name not in enabled:
        raise NotSupported(
            "scorer_disabled",
            f"The scorer {name} is Python code, which is not enabled here.",
            subject=name,
            next_step=f"If you trust it, install it and set ADAPTORY_SCORERS={','.join([*enabled, name])}.",
        )
    known = entry_points(group=GROUP)
    if name not in known.names:
        raise NotSupported(
            "scorer_missing",
            f"No installed package has a scorer {name} (entry points {GROUP}).",
            subject=name,
            next_step=f"Install its package. Installed scorers: {', '.join(sorted(known.names)) or 'none'}.",
        )
    return known


def package_of(chosen: ScorerChoice | None) -> str:
    """The installed package of a Python scorer, with its version: another package may score differently. Empty for one
    of Adaptory's, and for one that is not installed."""
    if chosen is None or chosen.name in BUILT_IN:
        return ""
    packages = [
        entry_point.dist for entry_point in entry_points(group=GROUP, name=chosen.name) if entry_point.dist is not None
    ]
    return f"{packages[0].name} {packages[0].version}" if packages else ""


def checked_score(
    scorer: Scorer, name: str, answer: str, example: Example, named: Callable[[Example], str] = prompt_of
) -> float:
    """The answer's score; `named` names an example in errors. Raises NotSupported if the scorer fails, is too slow
    or returns something else: a score that was not measured must not be recorded as 0."""
    try:
        score = float(scorer(answer, example))
    except ScorerTimeout as error:
        late = named(error.example or example)
        raise NotSupported(
            "scorer_timeout",
            f"The scorer {name} was ended: it returned {late} no score within {error.limit_s:g} s.",
            subject=name,
        ) from error
    except ScorerFailure as error:
        raise scorer_failed(name, named(error.example or example), str(error)) from error
    except (Exception, SystemExit) as error:
        raise scorer_failed(name, named(example), f"{type(error).__name__}: {error}") from error
    if not isfinite(score) or not 0 <= score <= 1:
        raise scorer_failed(name, named(example), f"it returned {score}, which is not from 0 to 1")
    return score


def scorer_failed(name: str, where: str, why: str) -> NotSupported:
    return NotSupported(
        "scorer_failed", f"The scorer {name} failed{f' on {where}' if where else ''}: {why[:500]}.", subject=name
    )
