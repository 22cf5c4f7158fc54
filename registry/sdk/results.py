"""What a registry answers, typed. `document` of each has everything that REST shows."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A score on a suite over `n` examples. A reported one was not measured by an evaluation; `source` says what
    measured or reports it."""

    suite: str
    metric: str
    value: float
    n: int
    stderr: float | None = None
    higher_is_better: bool = True
    reported: bool = False
    source: str | None = None

    @classmethod
    def of(cls, document: Json) -> "Score":
        """From its wire document."""
        return cls(**{name: document[name] for name in cls.__slots__})


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
    document: Json = field(repr=False, compare=False)

    @classmethod
    def of(cls, document: Json) -> "Release":
        """From its wire document."""
        named = {name: document[name] for name in ("repository", "version", "commit", "kind", "yanked")}
        scores = tuple(map(Score.of, document["scores"]))
        signed_as = document.get("signed_as")  # servers of earlier versions do not say
        return cls(**named, base=document["base"]["name"], scores=scores, signed_as=signed_as, document=document)

    def __str__(self) -> str:
        return f"{self.repository}:{self.version}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """A channel's move, by a promotion or a rollback. `from_version` is None for the first one."""

    id: int
    repository: str
    channel: str
    kind: str
    from_version: str | None
    to_version: str
    actor: str
    reason: str
    forced: bool
    at: datetime
    document: Json = field(repr=False, compare=False)

    @classmethod
    def of(cls, document: Json) -> "Move":
        """From its wire document."""
        names = ("id", "repository", "channel", "kind", "from_version", "to_version", "actor", "reason", "forced")
        at = datetime.fromisoformat(document["at"])
        return cls(**{name: document[name] for name in names}, at=at, document=document)


@dataclass(frozen=True, slots=True, kw_only=True)
class Promotion:
    """A promotion that waits for what its release lacks: `missing` are the open rules. It completes or fails by
    itself."""

    id: int
    repository: str
    channel: str
    version: str
    state: str
    missing: tuple[str, ...]
    document: Json = field(repr=False, compare=False)

    @classmethod
    def of(cls, document: Json) -> "Promotion":
        """From its wire document."""
        named = {name: document[name] for name in ("id", "repository", "channel", "version", "state")}
        missing = tuple(f"{row['rule']}: {row['detail']}" for row in document["gates"] if row["waiting"])
        return cls(**named, missing=missing, document=document)


@dataclass(frozen=True, slots=True, kw_only=True)
class Composition:
    """A composition or its plan. `verdict` is that of the conflict check, None before it; `published` are the releases
    that it made."""

    id: int
    state: str
    verdict: str | None
    published: tuple[str, ...]
    document: Json = field(repr=False, compare=False)

    @classmethod
    def of(cls, document: Json) -> "Composition":
        """From its wire document."""
        conflicts = document["conflicts"]
        return cls(
            id=document["id"],
            state=document["state"],
            verdict=conflicts["verdict"] if conflicts else None,
            published=tuple(f"{row['repository']}:{row['version']}" for row in document["results"]),
            document=document,
        )
