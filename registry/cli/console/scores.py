"""Tables of scores."""

from collections.abc import Sequence
from typing import Protocol

from registry.cli.console import render


class Scored(Protocol):
    """A score, recorded or just measured."""

    @property
    def suite(self) -> str: ...
    @property
    def metric(self) -> str: ...
    @property
    def value(self) -> float: ...
    @property
    def stderr(self) -> float | None: ...
    @property
    def n(self) -> int: ...
    @property
    def reported(self) -> bool: ...
    @property
    def source(self) -> str | None: ...
    @property
    def phrase(self) -> str | None: ...


def said_by(score: object) -> str:
    """The origin of a score: `measured by worker W` or `stated by U`; empty for a score that is not recorded yet."""
    worker, user = getattr(score, "measured_by", None), getattr(score, "stated_by", None)
    return f"measured by worker {worker}" if worker else f"stated by {user}" if user else ""


def _note(score: Scored) -> str:
    """Who reported or measured it elsewhere, and the phrase before the prompts."""
    phrase = f"with its phrase “{score.phrase}”" if score.phrase else ""
    return " ".join(filter(None, ["reported" if score.reported else "", score.source, phrase]))


def score_table(title: str, scores: Sequence[Scored]) -> None:
    """A table of scores with their origins. Those that are only reported are marked, with the file that reports them;
    others have the harness that measured them, if any, and the phrase before the prompts."""
    rows = [
        (
            score.suite,
            score.metric,
            render.with_error(score.value, score.stderr, score.n),
            score.n or "",
            _note(score),
            said_by(score),
        )
        for score in scores
    ]
    columns = ("suite", "metric", "value", "n", "note", "by")
    used = [index for index in range(len(columns)) if index < 4 or any(row[index] for row in rows)]
    render.table(title, [columns[index] for index in used], [[row[index] for index in used] for row in rows])
