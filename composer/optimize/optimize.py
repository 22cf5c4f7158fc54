"""Finds the method, settings and weights under which the worst member keeps most.

The objective, the race and the candidates were chosen by what they kept on unseen examples (docs/composing.md).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import inf
from pathlib import Path
from time import monotonic
from typing import Literal

from composer.conflicts.evidence.outcome import Limits, Outcome, effect_of, side_effect_of
from composer.deltas.delta import Delta, LowRank
from composer.deltas.variants.load import LoadedAdapter
from composer.errors import Mismatch, NotSupported
from composer.evaluation.calibration import Calibration
from composer.evaluation.hooks import Deltas
from composer.evaluation.measure import Measured
from composer.evaluation.model import LoadedModel
from composer.export.combine import refuse_uncombinable
from composer.findings import Verdict
from composer.formats.recipes.calibration_sets import CalibrationSet
from composer.formats.recipes.methods import Regmean
from composer.formats.recipes.policy import THRESHOLDS, Policy
from composer.formats.recipes.recipe import Optimize
from composer.formats.recipes.suite import Contradiction, Example, Suite, contradicting_suites
from composer.formats.recipes.weights import Weight
from composer.methods.combine import combine_parsed
from composer.methods.regmean import ModuleInputs, Observe
from composer.optimize.candidates import Candidate, fitted, full_space, low_rank, weighted_sum
from composer.optimize.examples import Split, splits
from composer.optimize.measurements import Asked, Journal, Measurements
from composer.optimize.objective import LEAST_GAIN, Standing, simplest_of_the_best
from composer.optimize.race import LEAST_KEPT, race, rungs
from composer.optimize.report import Confirmed, OptimizeReport, Tried, choose
from composer.optimize.surface import Point, proposed

SEARCH, CONFIRM = 8, 16
"""Default numbers of examples of each suite to search and to confirm on."""
_BEST = 3
_GUARDS_FROM = 4
_SURFACE_AT, _SURFACE_ROUNDS = 4, 3

FitOn = Literal["halves", "all"]
"""A fitted candidate is fitted on one half of the search examples and measured on the other, or fitted on all."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """An adapter to combine: its own weight, which is positive, and the suite that says what it is for."""

    adapter: LoadedAdapter
    suite: Suite
    weight: Weight = field(default_factory=Weight)


@dataclass(frozen=True)
class Effort:
    """`search` and `confirm` are examples of each suite. The search ends after `passes` measured examples or `seconds`,
    whichever comes first, and then confirms; the first round is always run. `seed` is that of fits."""

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
    """What to combine, and what counts. `load` returns the base, the same one every time. With `as_adapter`, only what
    one adapter can hold is tried. Members contradict each other if at least the share `same_prompts` of their prompts
    have other answers."""

    load: Callable[[], LoadedModel]
    members: Sequence[Member]
    guards: Sequence[Suite] = ()
    limits: Limits = field(default_factory=Limits)
    effort: Effort = field(default_factory=Effort)
    as_adapter: bool = False
    same_prompts: float = THRESHOLDS["same_prompts"] or 0.0

    def under(self, policy: Policy) -> "Problem":
        """The problem with the policy's limits."""
        share = policy.threshold("same_prompts")
        ignored = share is None or policy.ignores("same_prompts")
        return replace(self, limits=Limits.of(policy), same_prompts=inf if ignored or share is None else share)

    @cached_property
    def splits(self) -> dict[str, Split]:
        """The examples by suite digest. Raises Mismatch for a suite that is too small."""
        members = [one.suite for one in self.members]
        return splits(members, self.other_guards, self.effort.search, self.effort.confirm)

    @cached_property
    def other_guards(self) -> list[Suite]:
        """The guards, each once, without those that are a member's suite."""
        own = {one.suite.digest for one in self.members}
        return [one for digest, one in {guard.digest: guard for guard in self.guards}.items() if digest not in own]

    @property
    def searched(self) -> int:
        """The search examples of each member's suite."""
        return len(self.splits[self.members[0].suite.digest].search)

    @property
    def name(self) -> str:
        """Names the problem in a journal: what a result depends on beside the base's and the adapters' content."""
        members = [[one.adapter.name, one.weight.to_json(), one.suite.digest] for one in self.members]
        return json.dumps([members, [guard.digest for guard in self.other_guards], self.effort.search])

    def contradictions(self) -> list[Contradiction]:
        """The pairs of members for which no single model can serve both."""
        suites = {one.adapter.name: one.suite for one in self.members}
        return [one for one in contradicting_suites(suites) if one.share >= self.same_prompts]

    def check(self) -> None:
        """Raises Mismatch for fewer than two members, a repeated name, and a weight that is not positive."""
        names = [one.adapter.name for one in self.members]
        if len(names) < 2 or len(set(names)) < len(names):
            message = f"A search needs at least two members with different names, not {names}."
            raise Mismatch("probe_members", message, subject="members", next_step="Give each member its own name.")
        for one in self.members:
            if one.weight.value <= 0:
                message = f"{one.adapter.name} has the weight {one.weight.value:g}: there is nothing of it to keep."
                raise Mismatch("weights", message, subject=one.adapter.name, next_step="Give it a positive weight.")


def optimize(
    problem: Problem,
    given: Sequence[Candidate] = (),
    journal: Path | None = None,
    progress: Callable[[int], None] = lambda _count: None,
) -> OptimizeReport:
    """Searches for the best combination of the members and confirms it on examples that the search did not see.

    `given` are candidates to try beside the usual ones. A run with the same `journal` resumes: what was measured is not
    measured again, and the choice is the same. `progress` gets the number of examples just measured, 0 from within
    other work, and may raise.

    Raises what `Problem.check` and `encode` raise, and Mismatch or NotSupported if no candidate can be made.
    """
    problem.check()
    search = _Search(problem, Journal(journal, problem.name), progress)
    contradictions = problem.contradictions()
    best, tried = ([], []) if contradictions else search.run(given)
    return OptimizeReport(
        members=tuple(one.adapter.name for one in problem.members),
        choice=choose(best[:_BEST]),
        best=tuple(best),
        tried=tuple(tried),
        left_out=search.left_out,
        contradictions=tuple(contradictions),
        searched=tuple(split.to_json() for split in problem.splits.values()),
        passes=search.measurements.passes,
        run=search.measurements.run,
        search_s=search.search_s,
        confirm_s=monotonic() - search.started - search.search_s,
        seed=problem.effort.seed,
    )


def expected_passes(problem: Problem) -> int:
    """The examples that a search measures at most, without what a response surface proposes."""
    count, guards, searched = len(problem.members), len(problem.other_guards), problem.searched
    runners, total, done = len(low_rank(count)) + len(fitted(count)) + 1, 0, 0
    for k in rungs(searched):
        of_guards = k if k == min(_GUARDS_FROM, searched) else k - done if k > _GUARDS_FROM else 0
        total += runners * (count * (k - done) + guards * of_guards)
        runners, done = max(LEAST_KEPT, (runners + 1) // 2), k
    confirmed = [len(one.confirm) for one in problem.splits.values()]
    alone = count * (guards + 1) * (searched + max(confirmed))
    return total + sum(confirmed) * (_BEST + 2) + searched * (count + guards) + alone


class _Search:
    """One search: combines, fits and measures candidates, and keeps what is needed again."""

    def __init__(self, problem: Problem, journal: Journal, progress: Callable[[int], None]) -> None:
        self.started, self.search_s = monotonic(), 0.0
        self.problem, self.members, self.limits = problem, problem.members, problem.limits
        self.measurements = Measurements(problem.load, journal, progress)
        self.left_out: dict[str, str] = {}
        self._failure: Mismatch | NotSupported | None = None
        self._progress = progress
        self._fitted: dict[tuple[str, str], list[Delta]] = {}
        self._observed: dict[tuple[object, ...], Mapping[str, ModuleInputs]] = {}

    def run(self, given: Sequence[Candidate]) -> tuple[list[Confirmed], list[Tried]]:
        """The best candidates, confirmed, and all that were tried."""
        candidates = self._candidates(given)
        history = race(candidates, self._standing, self.problem.searched, self.limits, self._affordable)
        if not history:
            message, step = "No combination of these members can be made.", "Serve them separately."
            raise self._failure or Mismatch("conflict_members", message, subject="members", next_step=step)
        finalists = self._finalists(history)
        order = {one.key: index for index, one in enumerate(candidates)}
        finalists.sort(key=lambda one: order.get(one.candidate.key, len(order)))
        chosen = [one.candidate for one in simplest_of_the_best(finalists, self.limits)[:_BEST]]
        tried = {one.candidate.key: one for standings in (*history, finalists) for one in standings}
        chosen += [one for one in candidates if one.family == "mean" and one.key in tried and one not in chosen]
        self.search_s = monotonic() - self.started
        self._observed.clear()
        confirmed = [self._confirmed(one, len(chosen)) for one in chosen]
        return [one for one in confirmed if one is not None], [Tried.of(one, self.limits) for one in tried.values()]

    def _candidates(self, given: Sequence[Candidate]) -> list[Candidate]:
        """Each once, under its first name: the mean of two is half of their sum. How many examples to fit on is the
        search's to say."""
        count, named = len(self.members), dict[str, Candidate]()
        fits = fitted(count, self.problem.effort.seed) if self.problem.searched > 1 else []
        own = [replace(one, settings={k: v for k, v in one.settings.items() if k != "examples"}) for one in given]
        for one in (*low_rank(count), *fits, *own):
            if fits or not one.is_fitted:  # with a single search example there is none to fit on
                named.setdefault(one.key, one)
        return list(named.values())

    def _finalists(self, history: Sequence[Sequence[Standing]]) -> list[Standing]:
        """What reached the last rung, refined weights and, if all of that is harmful, full-space methods: all on the
        same examples."""
        last = list(history[-1])
        reached = last[0].outcome.k
        last += self._refined(history, reached)
        if all(one.outcome.verdict(self.limits) is Verdict.WARN for one in last) and self._affordable(reached):
            made = [self._standing(one, reached) for one in full_space(len(self.members))]
            last += [one for one in made if one is not None]
        return last

    def _affordable(self, examples: int) -> bool:
        """Whether `examples` more of every suite are within the budget, counted once for each candidate."""
        effort = self.problem.effort
        passes = self.measurements.passes + examples * len(self.problem.splits)
        return passes <= effort.passes and monotonic() - self.started <= effort.seconds

    @cached_property
    def _weights(self) -> list[Weight]:
        return [one.weight for one in self.members]

    def _refined(self, history: Sequence[Sequence[Standing]], reached: int) -> list[Standing]:
        """Weights that a response surface proposes, measured as the finalists are; each measurement improves it."""
        at = [one for standings in history for one in standings if one.outcome.k == _SURFACE_AT]
        sums, made = [one for one in at if one.candidate.is_weighted_sum], list[Standing]()
        for _ in range(_SURFACE_ROUNDS):
            weights = self._proposed(sums) if self._affordable(reached) else None
            if weights is None or weights in {one.candidate.factors for one in sums}:
                break
            name = f"sum {' '.join(f'{weight:g}' for weight in weights)}"
            candidate = weighted_sum(name, "refined", weights)
            point, final = self._standing(candidate, _SURFACE_AT), self._standing(candidate, reached)
            if point is None or final is None:
                break
            sums.append(point)
            made.append(final)
        return made

    def _proposed(self, sums: Sequence[Standing]) -> tuple[float, ...] | None:
        if not sums:
            return None
        effects, count = sums[0].outcome.effects, len(self.members)
        base, alone = [one.base for one in effects], [one.alone for one in effects]
        points = [
            Point(one.candidate.factors, tuple(effect.combined for effect in one.outcome.effects)) for one in sums
        ]
        points += [Point((0.0,) * count, tuple(base))]
        if all(weight == Weight() for weight in self._weights):  # with other weights, a member alone is another point
            points += [
                Point(
                    tuple(float(member == other) for other in range(count)),
                    tuple(alone[member] if member == other else None for other in range(count)),
                )
                for member in range(count)
            ]
        return proposed(points, base, alone, LEAST_GAIN)

    def _standing(self, candidate: Candidate, k: int) -> Standing | None:
        """The candidate on the first `k` search examples of each suite. Guards are measured once few candidates are
        left: they rarely decide."""
        own = {one.suite.digest for one in self.members}

        def chosen(split: Split) -> tuple[Example, ...]:
            measured = split.suite.digest in own or k >= min(_GUARDS_FROM, self.problem.searched)
            return split.search[:k] if measured else ()

        outcome = self._outcome(candidate, chosen, "halves", 1)
        return Standing(candidate, outcome) if outcome is not None else None

    def _confirmed(self, candidate: Candidate, claims: int) -> Confirmed | None:
        """The candidate, fitted on all search examples, on the unseen ones. The intervals of `claims` candidates hold
        together."""
        if candidate.is_fitted:
            candidate = replace(candidate, settings={**candidate.settings, "examples": self.problem.searched})
        outcome = self._outcome(candidate, lambda split: split.confirm, "all", claims)
        if outcome is None:
            return None
        unseen = min(one.examples for one in (*outcome.effects, *outcome.guards))
        verdict = outcome.verdict(self.limits)
        if len(outcome.guards) < len(self.problem.other_guards):  # a guard has no unseen example
            verdict = Verdict.worst([verdict, Verdict.UNDECIDED])
        return Confirmed(candidate=candidate, outcome=outcome, verdict=verdict, unseen=unseen)

    def _outcome(
        self, candidate: Candidate, chosen: Callable[[Split], tuple[Example, ...]], fit_on: FitOn, claims: int
    ) -> Outcome | None:
        """What the candidate does on the chosen examples; None, with the reason in `left_out`, if it cannot be made."""
        asked = {digest: [(split.suite, one) for one in chosen(split)] for digest, split in self.problem.splits.items()}
        guards = [guard for guard in self.problem.other_guards if asked[guard.digest]]
        of_guards = [one for guard in guards for one in asked[guard.digest]]
        base = self._by_suite("base", lambda: (), [one for rows in asked.values() for one in rows])
        alone = {
            one.adapter.name: self._by_suite(
                f"alone: {one.adapter.name}", lambda one=one: one.adapter.deltas, [*asked[one.suite.digest], *of_guards]
            )
            for one in self.members
        }
        try:
            combined = self._combined(candidate, asked, fit_on)
        except (Mismatch, NotSupported) as error:
            self.left_out[candidate.name] = str(error)
            self._failure = self._failure or error
            return None
        together = (len(self.members) + len(guards)) * claims
        effects = tuple(
            effect_of(
                (one.adapter.name, one.suite.name),
                base[one.suite.digest],
                alone[one.adapter.name][one.suite.digest],
                combined[one.suite.digest],
                together,
            )
            for one in self.members
        )
        side_effects = tuple(
            side_effect_of(
                guard.name,
                base[guard.digest],
                {name: run[guard.digest] for name, run in alone.items()},
                combined[guard.digest],
                together,
            )
            for guard in guards
        )
        return Outcome(max(map(len, asked.values())), effects, side_effects)

    def _by_suite(self, who: str, deltas: Callable[[], Deltas], asked: Sequence[Asked]) -> dict[str, list[Measured]]:
        results: dict[str, list[Measured]] = {}
        for (suite, _), measured in zip(asked, self.measurements.of(who, deltas, asked), strict=True):
            results.setdefault(suite.digest, []).append(measured)
        return results

    def _combined(
        self, candidate: Candidate, asked: Mapping[str, Sequence[Asked]], fit_on: FitOn
    ) -> dict[str, list[Measured]]:
        """The combination's results by suite."""
        if not candidate.is_fitted or fit_on == "all":
            rows = [one for rows in asked.values() for one in rows]
            sets = [CalibrationSet(one.suite, self.problem.searched) for one in self.members]
            return self._by_suite(candidate.key, lambda: self._deltas(candidate, sets, "all"), rows)
        half = self.problem.searched // 2
        results: dict[str, list[Measured]] = {digest: [] for digest in asked}
        for index, (scored, other) in enumerate(((slice(half), slice(half, None)), (slice(half, None), slice(half)))):
            rows = [one for rows in asked.values() for one in rows[scored]]
            who = f"{candidate.key} half {2 - index}"
            sets = self._sets(other, {example for _, example in rows})
            seen = self._by_suite(who, lambda sets=sets, who=who: self._deltas(candidate, sets, who), rows)
            for digest, measured in seen.items():
                results[digest] += measured
        return results

    def _sets(self, part: slice, scored: set[Example]) -> list[CalibrationSet]:
        """Each member's examples to fit on: a part of its search examples, without those that are `scored`, since
        suites may share some."""
        sets: list[CalibrationSet] = []
        for one in self.members:
            split = self.problem.splits[one.suite.digest]
            examples = [example for example in split.search[part] if example not in scored]
            sets.append(CalibrationSet(split.part(examples), len(examples)) if examples else CalibrationSet())
        return sets

    def _deltas(self, candidate: Candidate, sets: Sequence[CalibrationSet], fitted_on: str) -> Deltas:
        """The combined deltas; those of a fit are kept, since it takes seconds."""
        key = candidate.key, fitted_on
        if key in self._fitted:
            return self._fitted[key]
        self._progress(0)
        adapters, settings = [one.adapter for one in self.members], candidate.parsed.with_tied("untie")
        weights = candidate.weights(self._weights)
        if self.problem.as_adapter:
            refuse_uncombinable(adapters, weights, settings)
        observe = None
        if isinstance(settings, Regmean):
            calibration = Calibration(self.problem.load, sets, settings, lambda _count: self._progress(0))
            observe = self._observe(calibration, candidate)
        made = combine_parsed(adapters, weights, settings, observe).deltas
        if observe is not None:
            self._fitted[key] = made
        return made

    def _observe(self, calibration: Calibration, candidate: Candidate) -> Observe:
        """Observes inputs. Every fit begins with those under each member's own deltas, which are remembered: all fits
        on the same examples share them."""
        begun: set[int] = set()
        tokens = (calibration.settings.tokens, calibration.settings.seed)

        def observe(member: int, active: Sequence[Delta], wanted: Mapping[str, LowRank]) -> Mapping[str, ModuleInputs]:
            if member in begun:  # a second step, under the fitted deltas
                return calibration.observe(member, active, wanted)
            begun.add(member)
            key = (member, json.dumps(calibration.sets[member].to_json()), tokens, candidate.factors)
            if key not in self._observed:
                self._observed[key] = calibration.observe(member, active, wanted)
            return self._observed[key]

        return observe
