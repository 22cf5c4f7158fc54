"""The result of a search, for people and for a lock."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

from composer.conflicts.evidence.outcome import LEAST_EXAMPLES, Limits, Outcome
from composer.findings import Verdict
from composer.formats.recipes.suite import Contradiction
from composer.optimize.candidates import Candidate
from composer.optimize.objective import CandidateResults, kept_share


@dataclass(frozen=True, slots=True, kw_only=True)
class Confirmed:
    """A candidate on examples that the search has not seen, at least `unseen` of each suite. The intervals of all
    losses and rises of the confirmed candidates hold together."""

    candidate: Candidate
    outcome: Outcome
    verdict: Verdict
    unseen: int

    @property
    def worst_kept(self) -> float:
        return min(map(kept_share, self.outcome.effects))

    def to_json(self) -> dict[str, object]:
        return {
            **self.candidate.to_json(),
            "verdict": str(self.verdict),
            "worst_kept": self.worst_kept,
            "examples": self.unseen,
            "members": [{**effect.to_json(), "kept_share": kept_share(effect)} for effect in self.outcome.effects],
            "guards": [guard.to_json() for guard in self.outcome.guards],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """A candidate's last standing in the search. `k` examples of each suite were seen."""

    candidate: Candidate
    k: int
    worst_kept: float
    excess: float

    @classmethod
    def of(cls, standing: CandidateResults, limits: Limits) -> "Tried":
        return cls(
            candidate=standing.candidate,
            k=standing.outcome.k,
            worst_kept=min(standing.kept),
            excess=standing.excess(limits),
        )

    def to_json(self) -> dict[str, object]:
        numbers = {"worst_kept": self.worst_kept, "excess": self.excess}
        return {**self.candidate.to_json(), "k": self.k, **{k: v if isfinite(v) else None for k, v in numbers.items()}}


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizeReport:
    """`choice` is the best candidate that breaks no limit on unseen examples; None if there is none. `best` are the
    best three of the search and the mean, confirmed. `left_out` has candidates that cannot be made, and why. Nothing is
    tried if `contradictions` show that the members answer the same prompts differently. `searched` names the search
    examples of each suite by digest. `passes` examples were measured, `run` of them by this process, in `search_s` and
    `confirm_s` seconds."""

    members: tuple[str, ...]
    choice: Candidate | None
    best: tuple[Confirmed, ...]
    tried: tuple[Tried, ...]
    left_out: Mapping[str, str]
    contradictions: tuple[Contradiction, ...]
    searched: tuple[Mapping[str, object], ...]
    passes: int
    run: int
    search_s: float
    confirm_s: float
    seed: int

    def to_json(self) -> dict[str, object]:
        return {
            "members": list(self.members),
            "choice": self.choice.to_json() if self.choice else None,
            "best": [confirmed.to_json() for confirmed in self.best],
            "tried": [tried.to_json() for tried in self.tried],
            "left_out": dict(self.left_out),
            "contradictions": [
                {
                    "a": contradiction.a,
                    "b": contradiction.b,
                    "shared": contradiction.shared,
                    "different": contradiction.different,
                }
                for contradiction in self.contradictions
            ],
            "searched": [dict(examples) for examples in self.searched],
            "passes": self.passes,
            "run": self.run,
            "seconds": {"search": round(self.search_s, 1), "confirm": round(self.confirm_s, 1)},
            "seed": self.seed,
        }


def choose(best: Sequence[Confirmed]) -> Candidate | None:
    """The first that breaks no limit on unseen examples. None if all do."""
    return next((confirmed.candidate for confirmed in best if confirmed.verdict is not Verdict.WARN), None)


def document(report: OptimizeReport) -> dict[str, object]:
    """The report as JSON, with its answer in a sentence."""
    return {**report.to_json(), "headline": headline(report)}


def headline(report: OptimizeReport) -> str:
    """The answer in a sentence."""
    if report.contradictions:
        first = report.contradictions[0]
        return f"nothing was tried: {first.different} of {first.shared} shared prompts have other answers"
    if report.choice is None:
        return f"nothing fits: no combination of {len(report.tried)} keeps the limits"
    chosen = next(confirmed for confirmed in report.best if confirmed.candidate is report.choice)
    count, name = chosen.unseen, report.choice.name
    if chosen.verdict is Verdict.OK:
        return f"{name}, confirmed on {count} unseen examples per suite"
    if count < LEAST_EXAMPLES:
        return f"{name}, not confirmed: only {count} unseen examples"
    return f"{name}, undecided on {count} unseen examples per suite"
