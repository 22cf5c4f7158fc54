"""Finds the method, settings and weights under which the worst member keeps most.

The objective, the race and the candidates were chosen by what they kept on unseen examples (docs/composing.md).
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import inf
from pathlib import Path
from time import monotonic

from composer.conflicts.evidence.outcome import Limits, Outcome, effect_of, side_effect_of
from composer.deltas.delta import Delta, LowRank
from composer.deltas.stored import StoredFactor
from composer.deltas.variants.load import LoadedAdapter
from composer.errors import Mismatch
from composer.evaluation.calibration import Calibration
from composer.evaluation.evaluate import Deltas, Measured
from composer.evaluation.model import LoadedModel
from composer.findings import Severity, Verdict
from composer.formats.recipes.calibration_sets import CalibrationSet
from composer.formats.recipes.methods import Regmean
from composer.formats.recipes.recipe import Optimize
from composer.formats.recipes.suite import Example, Suite, contradicting_suites
from composer.formats.recipes.weights import Weight
from composer.methods.combine import combine_parsed, participating
from composer.methods.regmean import ModuleInputs, Observe
from composer.methods.structural import structural
from composer.optimize.candidates import Candidate, fitted, full_space, low_rank, weighted_sum
from composer.optimize.examples import Split, splits
from composer.optimize.measurements import Asked, Journal, Measurements
from composer.optimize.objective import LEAST_GAIN, Standing, simplest_of_the_best
from composer.optimize.race import LEAST_KEPT, race, rungs
from composer.optimize.report import Confirmed, OptimizeReport, Tried
from composer.optimize.surface import Point, proposed

SEARCH, CONFIRM = 8, 16
"""Default numbers of examples of each suite to search and to confirm on."""
_BEST = 3
_GUARDS_FROM = 4
_SURFACE_FROM, _SURFACE_ROUNDS = 4, 3


@dataclass(frozen=True, kw_only=True)
class Member:
    """An adapter to combine: its own weight, and the suite that says what it is for."""

    adapter: LoadedAdapter
    suite: Suite
    weight: Weight = field(default_factory=Weight)


@dataclass(frozen=True)
class Effort:
    """`search` and `confirm` are examples of each suite. The search ends after `passes` measured examples or `seconds`,
    whichever comes first, and then confirms; the first round is always run. `seed` draws weights where a grid would be
    too large."""

    search: int = SEARCH
    confirm: int = CONFIRM
    passes: float = inf
    seconds: float = inf
    seed: int = 0

    @classmethod
    def of(cls, asked: Optimize) -> "Effort":
        """The effort that a recipe asks for."""
        seconds = inf if asked.minutes is None else asked.minutes * 60
        return cls(asked.search, asked.confirm, asked.passes or inf, seconds, asked.seed)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What to combine, and what counts. `load` returns the base, the same one every time."""

    load: Callable[[], LoadedModel]
    members: Sequence[Member]
    guards: Sequence[Suite] = ()
    limits: Limits = field(default_factory=Limits)
    effort: Effort = field(default_factory=Effort)

    @property
    def suites(self) -> list[Suite]:
        return [*(one.suite for one in self.members), *self.guards]

    @property
    def name(self) -> str:
        """Names the problem in a journal: what a result depends on beside the base's and the adapters' content."""
        members = [[one.adapter.name, one.weight.to_json(), one.suite.digest] for one in self.members]
        return json.dumps([members, [guard.digest for guard in self.guards]])


def optimize(
    problem: Problem,
    given: Sequence[Candidate] = (),
    journal: Path | None = None,
    progress: Callable[[int], None] = lambda _count: None,
) -> OptimizeReport:
    """Searches for the best combination of the members and confirms it on examples that the search did not see.

    `given` are candidates to try beside the usual ones. A run with the same `journal` resumes: what was measured is not
    measured again, and the choice is the same. `progress` gets the number of examples just measured, and may raise.

    Raises Mismatch for fewer than two members, and what `combine_parsed` and `encode` raise.
    """
    if len(problem.members) < 2:
        message = f"A search needs at least two members, not {len(problem.members)}."
        raise Mismatch("too_few", message, subject="members", next_step="Name at least two adapters.")
    search = _Search(problem, Journal(journal, problem.name), progress)
    contradictions = contradicting_suites({one.adapter.name: one.suite for one in problem.members})
    best, tried = ([], []) if contradictions else search.run(given)
    choice = next((one.candidate for one in best[:_BEST] if one.verdict is not Verdict.WARN), None)
    return OptimizeReport(
        members=tuple(one.adapter.name for one in problem.members),
        choice=choice,
        best=tuple(best),
        tried=tuple(tried),
        contradictions=tuple(contradictions),
        searched=tuple(split.to_json() for split in search.splits.values()),
        passes=search.measurements.passes,
        search_s=search.search_s,
        confirm_s=monotonic() - search.started - search.search_s,
        seed=problem.effort.seed,
    )


def expected_passes(problem: Problem) -> int:
    """The examples that a search measures at most, without what it proposes itself."""
    count, suites = len(problem.members), problem.suites
    split = splits(suites, problem.effort.search, problem.effort.confirm)
    searched, total, done = next(iter(split.values())).searched, 0, 0
    runners = len(low_rank(count)) + len(fitted(count)) + 1
    for k in rungs(searched):
        guards = k if k == min(_GUARDS_FROM, searched) else k - done if k > _GUARDS_FROM else 0
        total += runners * (count * (k - done) + len(problem.guards) * guards)
        runners, done = max(LEAST_KEPT, (runners + 1) // 2), k
    confirmed = [len(one.confirm) for one in split.values()]
    alone = count * (len(problem.guards) + 1) * (searched + max(confirmed))
    return total + sum(confirmed) * (_BEST + 2) + searched * len(suites) + alone


class _Search:
    """One search: combines, fits and measures candidates, and keeps what is needed again."""

    def __init__(self, problem: Problem, journal: Journal, progress: Callable[[int], None]) -> None:
        self.started = monotonic()
        self.members, self.guards, self.limits, self.effort = (
            problem.members, problem.guards, problem.limits, problem.effort,
        )  # fmt: skip
        self.splits = splits(problem.suites, self.effort.search, self.effort.confirm)
        self.searched = next(iter(self.splits.values())).searched
        self.measurements = Measurements(problem.load, journal, progress)
        self.search_s = 0.0
        self._load = problem.load
        self._fitted: dict[tuple[str, str], list[Delta]] = {}
        self._observed: dict[tuple[object, ...], Mapping[str, ModuleInputs]] = {}

    def run(self, given: Sequence[Candidate]) -> tuple[list[Confirmed], list[Tried]]:
        """The best candidates, confirmed, and all that were tried."""
        candidates = [one for one in self._candidates(given) if self._is_possible(one)]
        history = race(candidates, self._standing, self.searched, self.limits, self._affordable)
        latest = {one.candidate.key: one for standings in history for one in standings}
        refined = self._refined([one for one in latest.values() if one.outcome.k >= min(_SURFACE_FROM, self.searched)])
        finalists = [one for one in latest.values() if one.outcome.k == history[-1][0].outcome.k] + refined
        nothing_fits = all(one.outcome.verdict(self.limits) is Verdict.WARN for one in finalists)
        if nothing_fits and self._affordable(self.searched):
            finalists += [self._standing(one, self.searched) for one in full_space(len(self.members))]
        order = {one.key: index for index, one in enumerate(candidates)}
        finalists.sort(key=lambda one: order.get(one.candidate.key, len(order)))
        chosen = [one.candidate for one in simplest_of_the_best(finalists, self.limits)[:_BEST]]
        self.search_s = monotonic() - self.started
        mean = [one for one in candidates if one.family == "mean" and one not in chosen]
        tried = {**latest, **{one.candidate.key: one for one in finalists}}
        return [self._confirmed(one) for one in (*chosen, *mean)], [
            Tried.of(one, self.limits) for one in tried.values()
        ]

    def _candidates(self, given: Sequence[Candidate]) -> Iterable[Candidate]:
        """Each once, under its first name: the mean of two is half of their sum."""
        count, named = len(self.members), dict[str, Candidate]()
        for one in (*low_rank(count), *(fitted(count) if self.searched > 1 else ()), *given):
            named.setdefault(one.key, one)
        return named.values()

    def _is_possible(self, candidate: Candidate) -> bool:
        """Whether the adapters can be combined so: `iso` and `tsv` need factors, and some findings refuse a method."""
        weights, settings = candidate.weights(self._weights), candidate.parsed
        parts = participating([one.adapter for one in self.members], weights, settings)
        return not any(finding.severity is Severity.ERROR for finding in structural(parts, settings))

    def _affordable(self, examples: int) -> bool:
        """Whether `examples` more of every suite are within the budget, counted once for each candidate."""
        passes = self.measurements.passes + examples * len(self.splits)
        return passes <= self.effort.passes and monotonic() - self.started <= self.effort.seconds

    @cached_property
    def _weights(self) -> list[Weight]:
        return [one.weight for one in self.members]

    def _refined(self, standings: Sequence[Standing]) -> list[Standing]:
        """Weights that a response surface proposes, measured on all search examples; each measurement improves it."""
        sums, made = [one for one in standings if one.candidate.is_weighted_sum], list[Standing]()
        for _ in range(_SURFACE_ROUNDS):
            if not self._affordable(self.searched):
                break
            weights = self._proposed([*sums, *made])
            if weights is None or weights in {one.candidate.factors for one in (*sums, *made)}:
                break
            name = f"sum {' '.join(f'{weight:g}' for weight in weights)}"
            made.append(self._standing(weighted_sum(name, "refined", weights), self.searched))
        return made

    def _proposed(self, sums: Sequence[Standing]) -> tuple[float, ...] | None:
        if not sums:
            return None
        effects = sums[0].outcome.effects
        base, alone = [one.base for one in effects], [one.alone for one in effects]
        count = len(effects)
        points = [
            Point(one.candidate.factors, tuple(effect.combined for effect in one.outcome.effects)) for one in sums
        ]
        points += [Point((0.0,) * count, tuple(base))]
        points += [
            Point(
                tuple(float(member == other) for other in range(count)),
                tuple(alone[member] if member == other else None for other in range(count)),
            )
            for member in range(count)
        ]
        return proposed(points, base, alone, LEAST_GAIN, self.effort.seed)

    def _standing(self, candidate: Candidate, k: int) -> Standing:
        """The candidate on the first `k` search examples of each suite. Guards are asked once few candidates are left:
        they rarely decide."""
        own = {one.suite.digest for one in self.members}

        def chosen(split: Split) -> tuple[Example, ...]:
            return split.search[:k] if split.suite.digest in own or k >= min(_GUARDS_FROM, self.searched) else ()

        return Standing(candidate, self._outcome(candidate, chosen, 1))

    def _confirmed(self, candidate: Candidate) -> Confirmed:
        """The candidate, fitted on all search examples, on the unseen ones."""
        final = self._final(candidate)
        outcome = self._outcome(final, lambda split: split.confirm, _BEST)
        return Confirmed(candidate=final, outcome=outcome, verdict=outcome.verdict(self.limits))

    def _final(self, candidate: Candidate) -> Candidate:
        if not candidate.is_fitted:
            return candidate
        return replace(candidate, settings={**candidate.settings, "examples": self.searched})

    def _outcome(self, candidate: Candidate, chosen: Callable[[Split], tuple[Example, ...]], claims: int) -> Outcome:
        asked = {digest: [(split.suite, one) for one in chosen(split)] for digest, split in self.splits.items()}
        guards = [one for guard in self.guards for one in asked[guard.digest]]
        base = self._by_suite("base", lambda: (), [one for rows in asked.values() for one in rows])
        alone = {
            one.adapter.name: self._by_suite(
                f"alone: {one.adapter.name}", lambda one=one: one.adapter.deltas, [*asked[one.suite.digest], *guards]
            )
            for one in self.members
        }
        combined = self._combined(candidate, asked)
        effects = tuple(
            effect_of(
                (one.adapter.name, one.suite.name),
                base[one.suite.digest],
                alone[one.adapter.name][one.suite.digest],
                combined[one.suite.digest],
                len(self.members) * claims,
            )
            for one in self.members
        )
        side_effects = tuple(
            side_effect_of(
                guard.name,
                base[guard.digest],
                {name: run[guard.digest] for name, run in alone.items()},
                combined[guard.digest],
            )
            for guard in self.guards
            if asked[guard.digest]
        )
        return Outcome(max(map(len, asked.values())), effects, side_effects)

    def _by_suite(self, who: str, deltas: Callable[[], Deltas], asked: Sequence[Asked]) -> dict[str, list[Measured]]:
        results: dict[str, list[Measured]] = {}
        for (suite, _), measured in zip(asked, self.measurements.of(who, deltas, asked), strict=True):
            results.setdefault(suite.digest, []).append(measured)
        return results

    def _combined(self, candidate: Candidate, asked: Mapping[str, Sequence[Asked]]) -> dict[str, list[Measured]]:
        """The combination's results by suite. While it is searched, a fitted one is fitted on one half of the search
        examples and measured on the other."""
        if not candidate.is_fitted or "examples" in candidate.settings:
            rows = [one for rows in asked.values() for one in rows]
            sets = [CalibrationSet(one.suite, self.searched) for one in self.members]
            return self._by_suite(candidate.key, lambda: self._deltas(candidate, sets, "all"), rows)
        half = self.searched // 2
        results: dict[str, list[Measured]] = {digest: [] for digest in asked}
        for index, part in enumerate((slice(half), slice(half, None))):
            rows = [one for rows in asked.values() for one in rows[part]]
            others = [self.splits[one.suite.digest].halves()[1 - index] for one in self.members]
            sets = [CalibrationSet(suite, len(suite.examples)) for suite in others]
            who = f"{candidate.key} half {2 - index}"
            seen = self._by_suite(who, lambda sets=sets, who=who: self._deltas(candidate, sets, who), rows)
            for digest, measured in seen.items():
                results[digest] += measured
        return results

    def _deltas(self, candidate: Candidate, sets: Sequence[CalibrationSet], fitted_on: str) -> Deltas:
        """The combined deltas; those of a fit are kept, since it takes seconds."""
        key = candidate.key, fitted_on
        if key in self._fitted:
            return self._fitted[key]
        adapters, settings = [one.adapter for one in self.members], candidate.parsed.with_tied("untie")
        observe = self._observe(Calibration(self._load, sets, settings)) if isinstance(settings, Regmean) else None
        made = combine_parsed(adapters, candidate.weights(self._weights), settings, observe).deltas
        if observe is not None:
            self._fitted[key] = made
        return made

    def _observe(self, calibration: Calibration) -> Observe:
        """Observes inputs, and remembers those under a member's own deltas: every fit begins with them. Those are known
        by their factors, which stay mapped from the adapter's file."""
        own = {one for member in self.members for one in _addresses(member.adapter.deltas)}

        def observe(member: int, active: Sequence[Delta], wanted: Mapping[str, LowRank]) -> Mapping[str, ModuleInputs]:
            addresses = _addresses(active)
            if len(addresses) < len(active) or not own.issuperset(addresses):
                return calibration.observe(member, active, wanted)
            scales = tuple(delta.scale for delta in active if isinstance(delta, LowRank))
            key = (member, str(calibration.sets[member].to_json()), (*addresses, *scales))
            if key not in self._observed:
                self._observed[key] = calibration.observe(member, active, wanted)
            return self._observed[key]

        return observe


def _addresses(deltas: Iterable[Delta]) -> list[int]:
    """The addresses of the mapped factors."""
    pairs = [delta.A for delta in deltas if isinstance(delta, LowRank)]
    return [factor.tensor.data_ptr() for factor in pairs if isinstance(factor, StoredFactor)]
