"""Finds the method, settings and weights under which the worst member retains the most.

The objective, the race and the candidates were chosen by what they kept on unseen examples
(docs/how-to/find-a-combination.md).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import monotonic

from composer.conflicts.evidence.bench import (
    Bench,
    Elsewhere,
    Key,
    Probed,
    Record,
    References,
    Results,
    Runner,
    not_run,
)
from composer.conflicts.evidence.outcome import LEAST_EXAMPLES, Effect, Outcome
from composer.conflicts.evidence.probe import Effort, grown
from composer.errors import Mismatch, NotSupported
from composer.evaluation.journal import JournalFile
from composer.evaluation.measure import ExampleScore
from composer.findings import Verdict
from composer.formats.recipes.suite import Example
from composer.formats.recipes.weights import Weight
from composer.optimize.candidates import (
    PLAIN_FIT,
    SELECTOR,
    Candidate,
    as_set,
    fitted,
    full_space,
    low_rank,
    weighted_sum,
)
from composer.optimize.combiner import Combiner, FitOn
from composer.optimize.evolution import Evolution
from composer.optimize.objective import LEAST_GAIN, CandidateResults, best_first, race, simplest_of_the_best
from composer.optimize.problem import CONFIRM_GROWTH, SearchProblem, Split
from composer.optimize.report import (
    Confirmed,
    OptimizeReport,
    Tried,
    accepted,
    broken_limit,
    choose,
    cut_share,
    undecided_answers,
)
from composer.optimize.routing import SetRouting
from composer.optimize.surface import Point, proposed


# The journal of a search, from which a run resumes.
class SearchJournal(Record):
    """The journal of measurements: a row for each pass over a batch. The pass of a torn row is run again as it was: in
    another batch the last bits would differ. Measurements of another problem, such as one with an older suite, are
    discarded.
    """

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__()
        self._file = JournalFile(path, {"problem": problem})
        for row in self._file.rows:
            for who, suite, example, nats, tokens, exact in row:
                self.known[who, suite, example] = ExampleScore(nats, tokens, exact)

    def add(self, measured: Iterable[tuple[Key, ExampleScore]]) -> None:
        """Records the results of a pass, in the file before the call returns."""
        rows = dict(measured)
        super().add(rows.items())
        self._file.append([[*key, row.nats, row.tokens, row.exact] for key, row in rows.items()])


_BEST = 3
_GUARDS_FROM = 4
_SURFACE_AT, _SURFACE_ROUNDS = 4, 3


def optimize(
    problem: SearchProblem,
    given: Sequence[Candidate] = (),
    journal: Path | None = None,
    progress: Callable[[int], None] = lambda _count: None,
    elsewhere: Elsewhere | None = None,
) -> OptimizeReport:
    """Searches for the best combination of the members and confirms it on examples that the search did not see.

    `given` are candidates to try besides the usual ones. A run with the same `journal` resumes without repeating
    measurements, and the choice is the same. `progress` gets the number of examples just measured, 0 from within other
    work, and may raise. Passes are run in this process, on the problem's base, or `elsewhere`, those of a round side by
    side; the choice is the same.

    Raises what `SearchProblem.check` and `encode` raise, and Mismatch or NotSupported if no candidate can be made.
    """
    problem.check()
    record = SearchJournal(journal, problem.name) if journal else Record()
    search = _Search(problem, Bench(Runner(problem.load, progress), record, elsewhere), progress)
    best, tried = search.run(given)
    best += search.as_set()
    choice, why = choose(best, may_be_set=problem.may_be_set), ""
    if taken := accepted(best, choice, problem.effort.accept, problem.limits):
        choice = taken.candidate
        although = broken_limit(taken.outcome, problem.limits, of_suite=True) or "a limit may be broken"
        why = f"accepted ({problem.effort.accept}; it is {cut_share(taken.worst)}) although {although}"
    return OptimizeReport(
        members=tuple(member.name for member in problem.members),
        choice=choice,
        accepted=why,
        reworded=search.reworded(choice) if choice else (),
        without_phrases=search.without_phrases(choice) if choice and choice.phrases else (),
        best=tuple(best),
        tried=tuple(tried),
        left_out=search.left_out,
        contradictions=tuple(problem.contradictions()),
        separability=tuple(problem.separability),
        routed=search.routing.routed,
        searched=tuple(split.to_json() for split in problem.splits.values()),
        passes=search.bench.passes,
        run=search.bench.run_now,
        search_s=search.search_s,
        confirm_s=monotonic() - search.started - search.search_s,
        seed=problem.effort.seed,
    )


def expected_passes(problem: SearchProblem, given: Sequence[Candidate] = ()) -> int:
    """The examples that a thorough search measures in which all candidates are equally good, counted by the search
    itself without running any."""
    bench, problem = Bench(not_run), replace(problem, effort=replace(problem.effort, thorough=True))
    search = _Search(problem, bench)
    search.run(given)
    search.as_set()
    return bench.passes


class _Search:
    """One search: combines, fits and measures candidates, and caches what is needed again."""

    def __init__(
        self, problem: SearchProblem, bench: Bench, progress: Callable[[int], None] = lambda _count: None
    ) -> None:
        self.started, self.search_s = monotonic(), 0.0
        self.problem, self.limits, self.bench = problem, problem.limits, bench
        self.members = [
            Probed(member.name, () if isinstance(member.adapter, str) else member.adapter.deltas, 1.0, member.suite)
            for member in problem.members
        ]
        self.combiner = Combiner(problem, progress)
        self.routing = SetRouting(problem, self.members)
        self.left_out: dict[str, str] = {}
        self._failure: Mismatch | NotSupported | None = None

    def run(self, given: Sequence[Candidate]) -> tuple[list[Confirmed], list[Tried]]:
        """The best candidates, confirmed, and all that were raced. Nothing is raced where members answer the same
        prompts differently, or where RegMean keeps every limit, as it is or with phrases."""
        candidates, contradicted = self._candidates(given), bool(self.problem.contradictions())
        at_once = contradicted or not self.problem.effort.thorough
        self.bench.run_ahead(lambda: self._ask_for_certain(candidates, at_once=at_once))
        first: list[Confirmed] = []
        if at_once:
            first = self._confirmed_at_once(candidates, always=contradicted or self.problem.wants_phrases)
        phrased = self._confirmed_with_phrases(candidates) if self.problem.wants_phrases else None
        with_phrases = [] if phrased is None else [phrased]
        kept = any(map(self._keeps_limits, [*first[:1], *with_phrases]))
        if contradicted or (first and kept):
            return [*first[:1], *with_phrases, *first[1:]], []
        best, tried = self._raced(candidates)
        return [*best, *with_phrases], tried

    def _raced(self, candidates: Sequence[Candidate]) -> tuple[list[Confirmed], list[Tried]]:
        """The best of a race, confirmed, and all that were in it."""
        history = race(candidates, self._standing, self.problem.searched, self.limits, self._affordable, self._ahead)
        if not history:
            message, step = "No combination of these members can be made.", "Serve them separately."
            raise self._failure or Mismatch("conflict_members", message, subject="members", next_step=step)
        finalists = self._finalists(history)
        order = {candidate.key: index for index, candidate in enumerate(candidates)}
        finalists.sort(key=lambda one: order.get(one.candidate.key, len(order)))
        chosen = [standing.candidate for standing in simplest_of_the_best(finalists, self.limits)[:_BEST]]
        tried = {standing.candidate.key: standing for standings in (*history, finalists) for standing in standings}
        chosen += [
            candidate
            for candidate in candidates
            if candidate.family == "mean" and candidate.key in tried and candidate not in chosen
        ]
        self.search_s = monotonic() - self.started
        self.combiner.forget_inputs()
        claims = len(chosen) + self.problem.wants_phrases
        self.bench.run_ahead(lambda: [self._confirmed(choice, claims) for choice in chosen])
        confirmed = [self._confirmed(choice, claims) for choice in chosen]
        return [standing for standing in confirmed if standing is not None], [
            Tried.of(standing, self.limits) for standing in tried.values()
        ]

    def _ask_for_certain(self, candidates: Sequence[Candidate], *, at_once: bool) -> None:
        """Asks for what every search confirms, and for plain RegMean and its reworded prompts if it is tried first."""
        if at_once:
            self._confirmed_at_once(candidates, always=True)
            for plain in (candidate for candidate in candidates if candidate.name == PLAIN_FIT):
                self.reworded(self._refitted(plain))
        if self.problem.wants_phrases:
            self._confirmed_with_phrases(candidates)
        self.as_set()

    def _confirmed_at_once(self, candidates: Sequence[Candidate], *, always: bool) -> list[Confirmed]:
        """RegMean in two steps, with the mean beside it, on the unseen examples; empty unless it keeps every limit or
        is wanted `always`. In the study no search clearly beat it, and it takes a tenth of the time."""
        plain = next((candidate for candidate in candidates if candidate.name == PLAIN_FIT), None)
        shown = [candidate for candidate in candidates if candidate.family == "mean"]
        if plain is None or (first := self._confirmed(plain, _BEST + 1)) is None:
            return []
        if not always and not self._keeps_limits(first):
            return []
        beside = [self._confirmed(mean, _BEST + 1) for mean in shown]
        return [first, *(confirmed for confirmed in beside if confirmed is not None)]

    def _confirmed_with_phrases(self, candidates: Sequence[Candidate]) -> Confirmed | None:
        """RegMean in two steps, fitted and measured with a phrase before each member's prompts."""
        plain = next((candidate for candidate in candidates if candidate.name == PLAIN_FIT), None)
        if plain is None:
            return None
        candidate = replace(plain, name=f"{plain.name}, with phrases", family=SELECTOR, phrases=self.problem.phrases)
        return self._confirmed(candidate, _BEST + 2)

    def as_set(self) -> list[Confirmed]:
        """The members with a router, on the unseen examples; empty if that is not possible."""
        confirmed = self._confirmed(as_set(len(self.members)), _BEST + 1)
        return [confirmed] if confirmed is not None else []

    def _keeps_limits(self, confirmed: Confirmed) -> bool:
        """Whether losses and guards are beyond doubt, and enough of the counted answers are left. The suites may have
        too few to prove that, which no other candidate would change."""
        if confirmed.verdict is Verdict.OK:
            return True
        decided = confirmed.outcome.verdict(replace(self.limits, answers=0.0)) is Verdict.OK
        guarded = len(confirmed.outcome.guards) == len(self.problem.other_guards)
        return decided and guarded and not confirmed.excess and confirmed.unseen >= LEAST_EXAMPLES

    def _candidates(self, given: Sequence[Candidate]) -> list[Candidate]:
        """The candidates, each once, under its first name: the mean of two is half of their sum. The search decides on
        how many
        examples a given one is fitted."""
        count, named = len(self.members), dict[str, Candidate]()
        fits = fitted(count, self.problem.effort.seed) if self.problem.searched > 1 else []
        usual = [candidate.with_settings(self.problem.result_settings) for candidate in (*low_rank(count), *fits)]
        own = [
            replace(candidate, settings={k: v for k, v in candidate.settings.items() if k != "examples"})
            for candidate in given
        ]
        for candidate in (*usual, *own):
            if fits or not candidate.is_fitted:  # with a single search example there is none to fit on
                named.setdefault(candidate.key, candidate)
        return list(named.values())

    def _finalists(self, history: Sequence[Sequence[CandidateResults]]) -> list[CandidateResults]:
        """The candidates that reached the last rung, refined weights and, if all of them are harmful, full-space
        methods: all on the same examples."""
        last = list(history[-1])
        reached = last[0].outcome.k
        last += self._refined(history, reached)
        last += self._evolved(history, reached)
        if all(standing.outcome.verdict(self.limits) is Verdict.WARN for standing in last) and self._affordable(
            reached
        ):
            result = self.problem.result_settings
            made = [
                self._standing(candidate.with_settings(result), reached) for candidate in full_space(len(self.members))
            ]
            last += [standing for standing in made if standing is not None]
        return last

    def _ahead(self, candidates: Sequence[Candidate], k: int) -> None:
        self.bench.run_ahead(lambda: [self._standing(candidate, k) for candidate in candidates])

    def _affordable(self, examples: int) -> bool:
        """Whether `examples` more of every suite are within the budget, counted once for each candidate."""
        effort = self.problem.effort
        passes = self.bench.passes + examples * len(self.problem.splits)
        return passes <= effort.passes and monotonic() - self.started <= effort.seconds

    def _refined(self, history: Sequence[Sequence[CandidateResults]], reached: int) -> list[CandidateResults]:
        """Weights that a response surface proposes, measured as the finalists are; each measurement improves it. They
        are worth it if some sum is a finalist. Then the surface is fitted on all sums, including those eliminated
        early."""
        if not any(standing.candidate.is_weighted_sum for standing in history[-1]):
            return []
        all_sums = [standing.candidate for standing in history[0] if standing.candidate.is_weighted_sum]
        if not self._affordable(_SURFACE_AT * len(all_sums)):
            return []
        sums = [standing for standing in map(self._on_surface, all_sums) if standing is not None]
        made = list[CandidateResults]()
        for _ in range(_SURFACE_ROUNDS):
            weights = self._proposed(sums) if self._affordable(reached) else None
            if weights is None or weights in {standing.candidate.factors for standing in sums}:
                break
            name = f"sum {' '.join(f'{weight:g}' for weight in weights)}"
            candidate = weighted_sum(name, "refined", weights).with_settings(self.problem.result_settings)
            point, final = self._on_surface(candidate), self._standing(candidate, reached)
            if point is None or final is None:
                break
            sums.append(point)
            made.append(final)
        return made

    def _evolved(self, history: Sequence[Sequence[CandidateResults]], reached: int) -> list[CandidateResults]:
        """The best weights of an evolution strategy that begins with the best sum of the first round, measured as the
        finalists are. A generation is measured on as many examples as a surface's points."""
        evolve = self.problem.effort.evolve
        sums = [standing for standing in history[0] if standing.candidate.is_weighted_sum]
        if not evolve or not sums:
            return []
        evolution = Evolution(best_first(sums, self.limits)[0].candidate.factors, self.problem.effort.seed)
        tried: list[CandidateResults] = []
        while len(tried) < evolve and self._affordable(_SURFACE_AT * evolution.population + reached):
            named = [
                (f"evolved {' '.join(f'{weight:g}' for weight in weights)}", weights) for weights in evolution.ask()
            ]
            made = [weighted_sum(name, "evolved", weights) for name, weights in named]
            candidates = [candidate.with_settings(self.problem.result_settings) for candidate in made]
            self.bench.run_ahead(lambda: [self._on_surface(candidate) for candidate in candidates])  # noqa: B023 - called at once
            generation = [self._on_surface(candidate) for candidate in candidates]
            standings = [standing for standing in generation if standing is not None]
            if len(standings) < len(generation):
                break
            order = sorted(range(len(standings)), key=lambda index: standings[index].rank(self.limits))
            evolution.tell(order)
            tried += standings
        best = self._standing(best_first(tried, self.limits)[0].candidate, reached) if tried else None
        return [best] if best is not None else []

    def _on_surface(self, candidate: Candidate) -> CandidateResults | None:
        return self._standing(candidate, min(_SURFACE_AT, self.problem.searched))

    def _proposed(self, sums: Sequence[CandidateResults]) -> tuple[float, ...] | None:
        if not sums:
            return None
        effects, count = sums[0].outcome.effects, len(self.members)
        base, alone = [effect.base for effect in effects], [effect.alone for effect in effects]
        points = [
            Point(standing.candidate.factors, tuple(effect.combined for effect in standing.outcome.effects))
            for standing in sums
        ]
        points += [Point((0.0,) * count, tuple(base))]
        if all(
            member.weight == Weight() for member in self.problem.members
        ):  # with other weights, a member alone is another point
            points += [
                Point(
                    tuple(float(member == other) for other in range(count)),
                    tuple(alone[member] if member == other else None for other in range(count)),
                )
                for member in range(count)
            ]
        return proposed(points, base, alone, LEAST_GAIN)

    def _standing(self, candidate: Candidate, k: int) -> CandidateResults | None:
        """The candidate on the first `k` search examples of each suite. Guards are measured once few candidates are
        left: they rarely decide."""
        own = {member.suite.digest for member in self.members}

        def chosen(split: Split) -> tuple[Example, ...]:
            measured = split.suite.digest in own or k >= min(_GUARDS_FROM, self.problem.searched)
            return split.search[:k] if measured else ()

        outcome = self._outcome(candidate, chosen, halves=True, claims=1)
        return CandidateResults(candidate, outcome) if outcome is not None else None

    def _confirmed(self, candidate: Candidate, claims: int) -> Confirmed | None:
        """The candidate, fitted on all search examples, on unseen ones: more of them while it is undecided. The
        intervals of `claims` candidates hold together."""
        candidate = self._refitted(candidate)

        def measured(k: int) -> Outcome | None:
            return self._outcome(candidate, lambda split: split.confirm[:k], halves=False, claims=claims)

        k = self.problem.effort.confirm
        if (first := measured(k)) is None:
            return None
        available = max(len(split.confirm) for split in self.problem.splits.values())
        effort = Effort(k, k * CONFIRM_GROWTH, self.limits)
        outcome = grown(lambda more: measured(more) or first, effort, available)
        unseen = min(effect.examples for effect in (*outcome.effects, *outcome.guards))
        verdict = outcome.verdict(self.limits)
        if len(outcome.guards) < len(self.problem.other_guards):  # a guard has no unseen example
            verdict = Verdict.worst([verdict, Verdict.UNDECIDED])
        return Confirmed(
            candidate=candidate,
            outcome=outcome,
            verdict=verdict,
            unseen=unseen,
            excess=CandidateResults(candidate, outcome).excess(self.limits),
            broken=broken_limit(outcome, self.limits),
            undecided=undecided_answers(outcome, self.limits),
        )

    def _refitted(self, candidate: Candidate) -> Candidate:
        """The candidate, fitted on all search examples."""
        if not candidate.is_fitted:
            return candidate
        return replace(candidate, settings={**candidate.settings, "examples": self.problem.searched})

    def reworded(self, candidate: Candidate) -> tuple[Effect, ...]:
        """The effects of a confirmed candidate on the members with chat suites, on unseen prompts in other words."""
        suites = {digest: split.reworded for digest, split in self.problem.splits.items()}
        members = [
            replace(member, suite=suite)
            for member in self.members
            if (suite := suites[member.suite.digest]) is not None
        ]
        if not members:
            return ()
        references = self.bench.references(members, [], lambda suite: suite.examples)
        combined = self._combined(candidate, references, halves=False)
        return references.outcome(0, combined, len(members)).effects

    def without_phrases(self, candidate: Candidate) -> tuple[Effect, ...]:
        """The effects of a confirmed candidate with phrases on unseen prompts without them."""
        splits = self.problem.splits
        references = self.bench.references(
            self.members, [], lambda suite: splits[suite.digest].confirm[: self.problem.effort.confirm]
        )
        combined = self.bench.run(candidate.key, lambda: self.combiner.deltas(candidate), references.rows)
        return references.outcome(0, combined, len(self.members)).effects

    def _outcome(
        self, candidate: Candidate, chosen: Callable[[Split], tuple[Example, ...]], *, halves: bool, claims: int
    ) -> Outcome | None:
        """Measures the candidate on the chosen examples; None, with the reason in `left_out`, if it cannot be made."""
        examples = {digest: chosen(split) for digest, split in self.problem.splits.items()}
        guards = [guard for guard in self.problem.other_guards if examples[guard.digest]]

        def run() -> tuple[References, Results]:
            references = self.bench.references(self.members, guards, lambda suite: examples[suite.digest])
            return references, self._combined(candidate, references, halves=halves)

        self.bench.run_ahead(run)
        try:
            references, combined = run()
        except (Mismatch, NotSupported) as error:
            self.left_out[candidate.name] = str(error)
            self._failure = self._failure or error
            return None
        together = (len(self.members) + len(guards)) * claims
        return references.outcome(max(map(len, examples.values())), combined, together, together)

    def _combined(self, candidate: Candidate, references: References, *, halves: bool) -> Results:
        """The combination's results. If it is fitted on `halves`, each half of the search examples is scored with the
        fit on the other. Those of a set are the members' own, and the base's."""
        if candidate.is_set:
            return self.routing.results(self.bench, references)
        if not candidate.is_fitted or not halves:
            rows = [self.problem.asked(candidate.phrases, *row) for row in references.rows]
            fit = "all" if candidate.is_fitted else ""
            results = self.bench.run(candidate.key, lambda: self.combiner.deltas(candidate), rows, fit)
            digests = {suite.digest: asked.digest for (suite, _), (asked, _) in zip(references.rows, rows, strict=True)}
            return {suite: results[asked] for suite, asked in digests.items()}
        asked, half = references.asked, self.problem.searched // 2
        results = {digest: list[ExampleScore]() for digest in asked}
        parts: tuple[tuple[slice, FitOn], ...] = ((slice(half), "second half"), (slice(half, None), "first half"))
        for scored, fit_on in parts:
            rows = [row for rows in asked.values() for row in rows[scored]]
            deltas = partial(self.combiner.deltas, candidate, fit_on)
            for digest, measured in self.bench.run(f"{candidate.key} {fit_on}", deltas, rows, fit_on).items():
                results[digest] += measured
        return results
