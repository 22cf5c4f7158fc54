"""The parts of a search that need no model: splits, the race, its objective, the response surface, the journal."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from composer.conflicts.evidence.outcome import Limits, Outcome, effect_of
from composer.errors import Mismatch
from composer.evaluation.measure import ExampleScore
from composer.findings import Verdict
from composer.formats.recipes.suite import Example, Suite
from composer.optimize.candidates import Candidate, fitted, low_rank, weighted_sum
from composer.optimize.objective import LEAST_GAIN, CandidateResults, race, rungs, simplest_of_the_best
from composer.optimize.optimize import SearchJournal
from composer.optimize.problem import splits
from composer.optimize.report import Confirmed, choose
from composer.optimize.surface import Point, proposed, unknowns

LIMITS = Limits(loss=10.0, answers=0.0)


def suite(count: int, name: str = "asked") -> Suite:
    examples = tuple(Example(f"{name} question {number}", f"answer {number}") for number in range(count))
    return Suite(name=name, kind="target", chat=False, examples=examples)


def standing(candidate: Candidate, nats: list[float], alone: float = 0.1, base: float = 3.0) -> CandidateResults:
    """A candidate with these nats per token on its only member's examples."""

    def measured(values: list[float]) -> list[ExampleScore]:
        return [ExampleScore(value, 1, exact=False) for value in values]

    run = measured([base] * len(nats)), measured([alone] * len(nats)), measured(nats)
    return CandidateResults(candidate, Outcome(len(nats), (effect_of(("member", "asked"), *run, 1),), ()))


@given(st.integers(2, 70), st.integers(1, 40), st.integers(1, 64), st.integers(1, 100))
def test_no_example_is_searched_and_confirmed_in_whatever_suites_it_is(
    count: int, of_guard: int, search: int, confirm: int
) -> None:
    own = suite(count)
    twice = Suite(**{**own.content, "name": "twice", "examples": (*own.examples, own.examples[0])})  # pyright: ignore[reportArgumentType]
    guard = suite(of_guard, "guard")
    parts = splits([own, twice], [guard], search, confirm)
    searched = [example for split in parts.values() for example in split.search]
    assert not set(searched) & {example for split in parts.values() for example in split.confirm}
    assert len(parts[own.digest].search) == len(parts[twice.digest].search) == min(search, count // 2)
    assert len(parts[guard.digest].search) <= of_guard // 2
    assert parts[own.digest].search == own.sample(len(parts[own.digest].search)), "a lock names them by their number"


def test_a_suite_of_one_example_is_refused_by_its_name() -> None:
    with pytest.raises(Mismatch, match="asked has only 1 example"):
        splits([suite(1), suite(8, "other")], [], 8, 16)


def test_every_candidate_has_one_name_and_the_mean_comes_first() -> None:
    for count in (2, 3, 8):
        candidates = [*low_rank(count), *fitted(count)]
        assert candidates[0].name == "mean"
        assert len({candidate.name for candidate in candidates}) == len(candidates)
        assert {len(candidate.factors) for candidate in candidates} == {count}
        assert all(candidate.parsed for candidate in candidates)


@given(st.integers(3, 40), st.integers(0, 2**32), st.permutations(list(range(6))))
def test_a_race_finds_the_planted_winner_whatever_the_order(count: int, seed: int, order: list[int]) -> None:
    generator = random.Random(seed)
    candidates = [weighted_sum(f"c{number}", "sum", [number]) for number in range(max(count, 6))]
    planted = candidates[generator.randrange(len(candidates))]
    noise = {candidate.name: [generator.gauss(0, 0.05) for _ in range(8)] for candidate in candidates}

    def measure(candidate: Candidate, k: int) -> CandidateResults:
        nats = 0.5 if candidate is planted else 1.2
        return standing(candidate, [nats + error for error in noise[candidate.name][:k]])

    shuffled = [candidates[index] for index in order] + candidates[6:]
    last = race(shuffled, measure, 8, LIMITS)[-1]
    assert last[0].candidate is planted
    assert [ranked.candidate.name for ranked in last] == [
        ranked.candidate.name for ranked in race(candidates, measure, 8, LIMITS)[-1]
    ]


def test_all_candidates_of_a_rung_see_the_same_number_of_examples_and_half_of_them_leave() -> None:
    candidates = [weighted_sum(f"c{number}", "sum", [number]) for number in range(16)]
    history = race(candidates, lambda one, k: standing(one, [float(one.factors[0])] * k), 8, LIMITS)
    assert [(rung[0].outcome.k, len(rung)) for rung in history] == [(2, 16), (4, 8), (8, 4)]
    assert {ranked.outcome.k for ranked in history[1]} == {4}
    assert (rungs(1), rungs(2), rungs(12)) == ([1], [2], [2, 4, 8, 12])


def test_a_race_ends_where_its_budget_does() -> None:
    candidates = [weighted_sum(f"c{number}", "sum", [number]) for number in range(4)]
    asked: list[int] = []
    history = race(
        candidates, lambda one, k: standing(one, [1.0] * k), 8, LIMITS, lambda count: not asked.append(count) and False
    )
    assert ([rung[0].outcome.k for rung in history], asked) == ([2], [3 * 2])


def test_nats_that_are_not_finite_never_win() -> None:
    broken, plain = weighted_sum("broken", "sum", [1]), weighted_sum("sum", "sum", [1])
    standings = [standing(broken, [float("nan")] * 4), standing(plain, [2.0] * 4)]
    assert [ranked.candidate.name for ranked in simplest_of_the_best(standings, Limits(loss=0.1))] == ["sum", "broken"]


def test_a_candidate_that_cannot_be_made_leaves_and_the_race_goes_on() -> None:
    candidates = [weighted_sum(f"c{number}", "sum", [number]) for number in range(4)]
    history = race(
        candidates, lambda one, k: None if one.name == "c0" else standing(one, [float(one.factors[0])] * k), 4, LIMITS
    )
    assert [[ranked.candidate.name for ranked in rung] for rung in history] == [["c1", "c2", "c3"], ["c1", "c2", "c3"]]
    assert race(candidates, lambda _one, _k: None, 4, LIMITS) == []


def test_of_nearly_equal_ones_the_simplest_wins_and_any_within_the_limits_beats_one_beyond() -> None:
    simple, better, beyond = (weighted_sum(name, "sum", [1]) for name in ("simple", "better", "beyond"))
    limits = Limits(loss=0.5, answers=0.0)
    standings = [standing(simple, [0.52] * 4), standing(better, [0.5] * 4), standing(beyond, [0.1] * 4, alone=-0.6)]
    ordered = simplest_of_the_best(standings, limits)
    assert [ranked.candidate.name for ranked in ordered] == ["simple", "better", "beyond"]
    assert ordered[2].excess(limits) > 0


def test_a_member_that_gained_nothing_counts_as_if_it_had_gained_a_little() -> None:
    nothing = standing(weighted_sum("sum", "sum", [1]), [3.1] * 4, alone=3.0)
    assert nothing.kept == [pytest.approx(-0.1 / LEAST_GAIN)]


def test_an_ok_candidate_is_chosen_before_an_undecided_one_and_two_steps_before_one() -> None:
    def confirmed(name: str, verdict: Verdict, excess: float = 0.0, steps: int = 0) -> Confirmed:
        candidate = weighted_sum(name, "sum", [1])
        if steps:
            candidate = replace(candidate, family="regmean", method="regmean", settings={"steps": steps})
        outcome = standing(candidate, [0.5] * 8).outcome
        return Confirmed(candidate=candidate, outcome=outcome, verdict=verdict, unseen=8, excess=excess)

    first, second, third = (
        confirmed("a", Verdict.WARN), confirmed("b", Verdict.UNDECIDED), confirmed("c", Verdict.OK),
    )  # fmt: skip
    assert choose([first, second, third]) is third.candidate
    assert choose([third, second]) is third.candidate
    assert choose([first]) is None
    below = confirmed("below", Verdict.UNDECIDED, excess=0.1)
    assert choose([below, second]) is second.candidate
    assert choose([first, below]) is below.candidate
    one, two = confirmed("one", Verdict.OK, steps=1), confirmed("two", Verdict.OK, steps=2)
    assert choose([one, third, two]) is two.candidate
    assert choose([third, one, two]) is third.candidate
    assert choose([one, replace(two, verdict=Verdict.UNDECIDED)]) is one.candidate


def test_the_surface_proposes_the_weights_where_the_worst_member_keeps_most() -> None:
    def log_nats(weights: np.ndarray, best: tuple[float, float]) -> float:
        return float(-1.0 + 2.0 * np.square(weights - np.array(best)).sum())

    centres = ((0.9, 0.5), (0.5, 0.9))  # each member's own optimum: the worst one is best between them
    axis = (0.0, 0.5, 1.0)
    points = [
        Point((a, b), (np.exp(log_nats(np.array([a, b]), centres[0])), np.exp(log_nats(np.array([a, b]), centres[1]))))
        for a in axis
        for b in axis
    ]
    result = proposed(points, (5.0, 5.0), (0.3, 0.3), LEAST_GAIN)
    assert result is not None
    assert np.allclose(result, (0.7, 0.7), atol=0.051)


def test_too_few_points_or_points_on_a_line_give_no_surface() -> None:
    few = [Point((float(number), 0.0), (1.0, 1.0)) for number in range(unknowns(2) - 1)]
    line = [Point((number / 7, number / 7), (1.0, 1.0)) for number in range(8)]
    assert proposed(few, (2.0, 2.0), (1.0, 1.0), LEAST_GAIN) is None
    assert proposed(line, (2.0, 2.0), (1.0, 1.0), LEAST_GAIN) is None


def test_a_journal_is_read_again_after_a_torn_last_line_and_begins_anew_for_another_problem(tmp_path: Path) -> None:
    path = tmp_path / "search.jsonl"
    key, measured = ("mean", "suite", "example"), ExampleScore(0.1 + 0.2, 3, exact=True)
    SearchJournal(path, "one").add([(key, measured)])
    with path.open("a") as file:
        file.write('["mean", "suite", "oth')
    again = SearchJournal(path, "one")
    assert again.known == {key: measured}
    again.add([(("sum", "suite", "example"), measured)])
    assert len(SearchJournal(path, "one").known) == 2
    assert SearchJournal(path, "two").known == {}
