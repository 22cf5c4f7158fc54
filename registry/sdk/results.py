"""Typed answers of a registry. `document` of each has everything that REST shows.

Documents of the API have the names that they have had here; a release differs, as its base is a name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from registry.wire.catalog import ReleaseOut
from registry.wire.fleet import RolloutOut
from registry.wire.quality import MoveOut, PromotionOut, ScoreOut
from registry.wire.work import CompositionOut

Move = MoveOut
Promotion = PromotionOut
Composition = CompositionOut
Rollout = RolloutOut


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A score on a suite over `n` examples. A reported one was not measured by an evaluation; `source` says what
    measured or reports it. `phrase` was before each prompt."""

    suite: str
    metric: str
    value: float
    n: int
    stderr: float | None = None
    higher_is_better: bool = True
    reported: bool = False
    source: str | None = None
    phrase: str | None = None

    @classmethod
    def of(cls, document: ScoreOut) -> "Score":
        """Makes it from its document."""
        return cls(**{name: getattr(document, name) for name in cls.__slots__})


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """An adapter or a merged model, published. `base` is the name of its base; `signed_as` says whether a `publisher`
    or a `worker` signed it, None if nobody did."""

    repository: str
    version: str
    commit: str
    kind: str
    base: str
    yanked: bool
    scores: tuple[Score, ...]
    signed_as: str | None = None
    document: Mapping[str, Any] = field(repr=False, compare=False)

    @classmethod
    def of(cls, document: ReleaseOut) -> "Release":
        """Makes it from its document."""
        same = {name: getattr(document, name) for name in cls.__slots__ if name not in ("base", "scores")}
        return cls(**same, base=document.base.name, scores=tuple(map(Score.of, document.scores)))

    def __str__(self) -> str:
        return f"{self.repository}:{self.version}"
