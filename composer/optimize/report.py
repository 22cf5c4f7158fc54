"""The result of a search, for people and for a lock."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import floor, isfinite
from typing import NotRequired, TypedDict

from composer.conflicts.documents import EffectDocument, GuardDocument
from composer.conflicts.evidence.interval import needed_for
from composer.conflicts.evidence.outcome import LEAST_EXAMPLES, Effect, Limits, Outcome
from composer.findings import Verdict
from composer.formats.recipes.lock import ChoiceDocument, ExamplesDocument, SearchDocument
from composer.formats.recipes.methods import Regmean
from composer.formats.recipes.recipe import accepted_share
from composer.formats.recipes.suite import Contradiction
from composer.optimize.candidates import Candidate
from composer.optimize.objective import CandidateResults, kept_share
from composer.optimize.problem import Separability
from composer.optimize.routing import Routed

ONE_ADAPTER, WITH_PHRASES, AS_SET = "one adapter", "one adapter with a selector", "a set"
ANSWERS = (ONE_ADAPTER, WITH_PHRASES, AS_SET)
"""What a search may answer, in order of preference at equal evidence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Confirmed:
    """A candidate on examples that the search has not seen, at least `unseen` of each suite. The intervals of all
    losses and rises of the confirmed candidates hold together. `excess` is by how much the worst value exceeds its
    limit, sure or not, and `broken` names a limit that is surely broken. `undecided` are the members whose answers are
    too few to judge them, each with how many would do."""

    candidate: Candidate
    outcome: Outcome
    verdict: Verdict
    unseen: int
    excess: float = 0.0
    broken: str = ""
    undecided: tuple[str, ...] = ()

    @property
    def answer(self) -> str:
        """Which of ANSWERS this is."""
        if self.candidate.is_set:
            return AS_SET
        return WITH_PHRASES if self.candidate.phrases else ONE_ADAPTER

    @property
    def worst_kept(self) -> float:
        return min(map(kept_share, self.outcome.effects))

    @property
    def worst(self) -> float:
        """The smallest share of its gain, or of its answers, that a member keeps."""
        answers = [effect.still_answered / effect.answered for effect in self.outcome.effects if effect.answered]
        return min([self.worst_kept, *answers])

    def to_json(self) -> "ConfirmedDocument":
        return {
            **self.candidate.to_json(),
            "answer": self.answer,
            "verdict": str(self.verdict),
            "worst_kept": self.worst_kept,
            "examples": self.unseen,
            "broken": self.broken,
            "members": list(map(_with_share, self.outcome.effects)),
            "guards": [guard.to_json() for guard in self.outcome.guards],
        }


class MeasuredMember(EffectDocument):
    """The effect on a member, and the share of its gain or of its answers that is left."""

    kept_share: float


class ConfirmedDocument(ChoiceDocument):
    """A `Confirmed`."""

    answer: str
    verdict: str
    worst_kept: float
    examples: int
    broken: str
    members: list[MeasuredMember]
    guards: list[GuardDocument]


class TriedDocument(ChoiceDocument):
    """A `Tried`. A number that is not finite is None."""

    k: int
    worst_kept: float | None
    excess: float | None


class Seconds(TypedDict):
    """The duration of a search and of its confirmation."""

    search: float
    confirm: float


class SeparableDocument(TypedDict):
    """The share of prompts that tell two members apart."""

    a: str
    b: str
    share: float


class RoutedDocument(TypedDict):
    name: str
    right: int
    count: int


class ContradictionDocument(TypedDict):
    a: str
    b: str
    shared: int
    different: int


class OptimizeDocument(SearchDocument):
    """An `OptimizeReport` with its headline, as a lock keeps it; those of earlier versions lack some fields."""

    members: list[str]
    reworded: NotRequired[list[MeasuredMember]]
    without_phrases: NotRequired[list[MeasuredMember]]
    separability: NotRequired[list[SeparableDocument]]
    routed: NotRequired[list[RoutedDocument]]
    best: list[ConfirmedDocument]
    tried: list[TriedDocument]
    left_out: Mapping[str, str]
    contradictions: NotRequired[list[ContradictionDocument]]
    passes: int
    run: int
    seconds: Seconds
    seed: int


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

    def to_json(self) -> TriedDocument:
        return {
            **self.candidate.to_json(),
            "k": self.k,
            "worst_kept": self.worst_kept if isfinite(self.worst_kept) else None,
            "excess": self.excess if isfinite(self.excess) else None,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizeReport:
    """`choice` is the best candidate that breaks no limit on unseen examples; None if there is none. `accepted` says
    which limit it breaks, sure or not, and why it was taken nevertheless; empty if it breaks none. `reworded` are its
    effects on members with chat suites, on unseen prompts in other words; `without_phrases` those of a choice with
    phrases on prompts without them. `best` are the best of the search and the mean, confirmed. `left_out` has
    candidates that cannot be made, and why. Nothing is raced if `contradictions` show that the members answer the same
    prompts differently. `separability` is how far prompts tell members apart, and `routed` how well a set's router does
    it. `searched` names the search examples of each suite by digest. `passes` examples were measured, `run` of them by
    this process, in `search_s` and `confirm_s` seconds."""

    members: tuple[str, ...]
    choice: Candidate | None
    accepted: str
    reworded: tuple[Effect, ...]
    without_phrases: tuple[Effect, ...]
    best: tuple[Confirmed, ...]
    tried: tuple[Tried, ...]
    left_out: Mapping[str, str]
    contradictions: tuple[Contradiction, ...]
    separability: tuple[Separability, ...]
    routed: tuple[Routed, ...]
    searched: tuple[ExamplesDocument, ...]
    passes: int
    run: int
    search_s: float
    confirm_s: float
    seed: int

    def to_json(self) -> OptimizeDocument:
        document: OptimizeDocument = {
            "headline": headline(self),
            "offers": offers(self),
            "members": list(self.members),
            "choice": self.choice.to_json() if self.choice else None,
            "reworded": list(map(_with_share, self.reworded)),
            "without_phrases": list(map(_with_share, self.without_phrases)),
            "separability": [{"a": pair.a, "b": pair.b, "share": pair.share} for pair in self.separability],
            "routed": [{"name": own.name, "right": own.right, "count": own.count} for own in self.routed],
            "best": [confirmed.to_json() for confirmed in self.best],
            "tried": [tried.to_json() for tried in self.tried],
            "left_out": dict(self.left_out),
            "contradictions": [
                {"a": pair.a, "b": pair.b, "shared": pair.shared, "different": pair.different}
                for pair in self.contradictions
            ],
            "searched": list(self.searched),
            "passes": self.passes,
            "run": self.run,
            "seconds": {"search": round(self.search_s, 1), "confirm": round(self.confirm_s, 1)},
            "seed": self.seed,
        }
        if self.accepted:
            document["accepted"] = self.accepted
        return document


def _with_share(effect: Effect) -> MeasuredMember:
    return {**effect.to_json(), "kept_share": kept_share(effect)}


def accepted(best: Sequence[Confirmed], choice: Candidate | None, accept: str, limits: Limits) -> Confirmed | None:
    """The candidate that the acceptance is needed for: the `choice` if it breaks a limit as measured, sure or not; if
    there is none, of all the best that is one adapter, leaves every member the share, and harms no guard. None without
    an acceptance."""
    if not accept:
        return None
    share = accepted_share(accept)
    allowed = [
        confirmed
        for confirmed in best
        if not confirmed.candidate.is_set
        and choice in (None, confirmed.candidate)
        and (confirmed.excess > 0 or confirmed.broken)
        and confirmed.worst >= share
        and all(guard.verdict(limits) is not Verdict.WARN for guard in confirmed.outcome.guards)
    ]
    return max(allowed, key=lambda confirmed: confirmed.worst, default=None)


def cut_share(share: float) -> str:
    """A share in hundredths, never more than it is: an acceptance of it holds."""
    return f"{floor(share * 100 + 1e-9) / 100:.2f}"


def choose(best: Sequence[Confirmed], *, may_be_set: bool = False) -> Candidate | None:
    """The best of the confirmed candidates by `_rank`, and of equal ones the first. Of alike fits, that in two steps is
    preferred to that in one. A set is chosen where it may be and all others are harmful. None if nothing is left."""
    harmless = [confirmed for confirmed in best if confirmed.verdict is not Verdict.WARN]
    usable = sorted((confirmed for confirmed in harmless if not confirmed.candidate.is_set), key=_rank)
    if not usable:
        return next(
            (
                candidate
                for candidate in (confirmed.candidate for confirmed in harmless)
                if candidate.is_set and may_be_set
            ),
            None,
        )
    first = usable[0]
    equal = [confirmed for confirmed in usable if _rank(confirmed) == _rank(first)]
    family = [alike.candidate for alike in equal if alike.candidate.family == first.candidate.family]
    return max(family, key=lambda one: _steps(one)) if first.candidate.is_fitted else first.candidate


def _rank(confirmed: Confirmed) -> tuple[int, bool, int]:
    """By verdict on unseen examples, then those whose measured values keep the limits, then by what users have to do:
    one adapter before one with phrases."""
    return list(Verdict).index(confirmed.verdict), confirmed.excess > 0, ANSWERS.index(confirmed.answer)


def _steps(candidate: Candidate) -> int:
    settings = candidate.parsed
    return settings.steps if isinstance(settings, Regmean) else 0


def broken_limit(outcome: Outcome, limits: Limits, *, of_suite: bool = False) -> str:
    """Names the member or guard that surely breaks a limit, with its value and the limit; empty if none does. With
    `of_suite` a member is named by its suite: readers of a release need not be allowed to read its inputs."""
    return next(iter(_broken(outcome, limits, of_suite=of_suite)), "")


def undecided_answers(outcome: Outcome, limits: Limits) -> tuple[str, ...]:
    """The members whose answers are too few to show that enough are left, each with how many would show it."""
    return tuple(
        f"Add examples to {effect.suite} to decide whether it keeps {limits.answers:.0%} of its exact matches: it "
        f"keeps {effect.still_answered} of {effect.answered}, and {needed} would do if no more are lost."
        for effect in outcome.effects
        if effect.of_answers(limits) is Verdict.UNDECIDED
        and (needed := needed_for(limits.answers, effect.answered - effect.still_answered))
    )


def _broken(outcome: Outcome, limits: Limits, *, of_suite: bool) -> Iterable[str]:
    victim = outcome.victim(limits)
    name = f"the input of {victim.suite}" if of_suite else victim.member
    if victim.of_answers(limits) is Verdict.WARN:
        left = f"{victim.still_answered} of {victim.answered} exact matches"
        yield f"{name} keeps {left}, {limits.answers:.0%} required"
    if victim.of_loss(limits) is Verdict.WARN:
        yield f"{name} loses {victim.loss:.2f} nats a token, {victim.limit(limits):.2f} allowed"
    for guard in outcome.guards:
        if guard.verdict(limits) is Verdict.WARN:
            yield f"{guard.suite} rises {guard.rise:.2f} nats a token, {limits.guard:.2f} allowed"


def offers(report: OptimizeReport) -> list[str]:
    """The ways to serve the members where nothing fits, each with what to write, the most promising first. For a choice
    that is undecided, what would decide it."""
    if report.choice is not None:
        chosen = next(confirmed for confirmed in report.best if confirmed.candidate is report.choice)
        return list(dict.fromkeys(chosen.undecided))  # members may share a suite
    offered: list[str] = []
    if kept := _kept_by_set(report):
        offered.append(f"A set with a router {kept}: add `set: NAMESPACE/NAME:VERSION` to the recipe.")
    if not any(best.candidate.phrases for best in report.best):
        offered.append("A phrase before the prompts of each may tell them apart: add `phrase: TEXT` to every input.")
    return [*offered, "Serve them separately, and name the adapter in each request."]


def _kept_by_set(report: OptimizeReport) -> str:
    """Whether a set keeps the limits, in words; empty if it breaks one or was not measured."""
    words = {Verdict.OK: "keeps the limits", Verdict.UNDECIDED: "may keep the limits", Verdict.WARN: ""}
    return next((words[best.verdict] for best in report.best if best.candidate.is_set), "")


def _nearest(best: Sequence[Confirmed]) -> str:
    """The best combination that breaks a limit, and the limit: what it takes to accept it."""
    broken = [confirmed for confirmed in best if confirmed.broken and not confirmed.candidate.is_set]
    if not broken:
        return ""
    first = max(broken, key=lambda confirmed: confirmed.worst)
    return f"; the best is {first.candidate.name}, whose worst member keeps {cut_share(first.worst)}: {first.broken}"


def headline(report: OptimizeReport) -> str:
    """The answer in a sentence."""
    if report.choice is None:
        nearest = _nearest(report.best)
        if kept := _kept_by_set(report):
            nearest += f"; a set with a router {kept}"
        if report.contradictions:
            first = report.contradictions[0]
            return f"nothing fits: {first.different} of {first.shared} shared prompts have other answers{nearest}"
        return f"nothing fits: no combination of {len(report.tried)} keeps the limits{nearest}"
    chosen = next(confirmed for confirmed in report.best if confirmed.candidate is report.choice)
    count, name = chosen.unseen, f"{chosen.answer}: {report.choice.name}"
    if report.accepted:
        return f"{name}, {report.accepted}"
    if chosen.verdict is Verdict.OK:
        return f"{name}, confirmed on at least {count} unseen examples per suite"
    if count < LEAST_EXAMPLES:
        return f"{name}, not confirmed: only {count} unseen examples"
    return f"{name}, undecided on at least {count} unseen examples per suite"
