"""The parts of a search that need no model: splits, the race, its objective, the response surface, the journal."""

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from composer.conflicts.evidence.outcome import Limits, Outcome, effect_of
from composer.errors import RefusedOutput
from composer.evaluation.evaluate import Measured
from composer.formats.recipes.suite import Example, Suite
from composer.optimize.candidates import Candidate, fitted, low_rank, weighted_sum
from composer.optimize.examples import splits
from composer.optimize.measurements import Journal
from composer.optimize.objective import LEAST_GAIN, Standing, simplest_of_the_best
from composer.optimize.race import race, rungs
from composer.optimize.surface import Point, proposed, unknowns

LIMITS = Limits(loss=10.0, answers=0.0)


def suite(count: int, name: str = "asked") -> Suite:
    examples = tuple(Example(f"{name} question {number}", f"answer {number}") for number in range(count))
    return Suite(name=name, kind="target", chat=False, examples=examples)


def standing(candidate: Candidate, nats: list[float], alone: float = 0.1, base: float = 3.0) -> Standing:
    """A candidate that has these nats a token on its only member's examples."""

    def measured(values: list[float]) -> list[Measured]:
        return [Measured(value, 1, exact=False) for value in values]

    run = measured([base] * len(nats)), measured([alone] * len(nats)), measured(nats)
    return Standing(candidate, Outcome(len(nats), (effect_of(("member", "asked"), *run, 1),), ()))


@given(st.integers(2, 70), st.integers(1, 64), st.integers(1, 100))
def test_no_example_has_two_roles(count: int, search: int, confirm: int) -> None:
    split = splits([suite(count)], search, confirm)[suite(count).digest]
    first, second = split.halves() if split.searched > 1 else (None, None)
    assert not set(split.search) & set(split.confirm)
    assert len(split.search) == min(search, count // 2)
    if first and second:
        assert not set(first.examples) & set(second.examples)
        assert (*first.examples, *second.examples) == split.search
    assert split.search == suite(count).sample(split.searched), "a lock names them by their number"


def test_every_candidate_has_one_name_and_the_mean_comes_first() -> None:
    for count in (2, 3, 8):
        candidates = [*low_rank(count), *fitted(count)]
        assert candidates[0].name == "mean"
        assert len({one.name for one in candidates}) == len(candidates)
        assert {len(one.factors) for one in candidates} == {count}
        assert all(one.parsed for one in candidates)


@given(st.integers(3, 40), st.integers(0, 2**32), st.permutations(list(range(6))))
def test_a_race_finds_the_planted_winner_whatever_the_order(count: int, seed: int, order: list[int]) -> None:
    generator = random.Random(seed)
    candidates = [weighted_sum(f"c{number}", "sum", [number]) for number in range(max(count, 6))]
    planted = candidates[generator.randrange(len(candidates))]
    noise = {one.name: [generator.gauss(0, 0.05) for _ in range(8)] for one in candidates}

    def measure(candidate: Candidate, k: int) -> Standing:
        nats = 0.5 if candidate is planted else 1.2
        return standing(candidate, [nats + one for one in noise[candidate.name][:k]])

    shuffled = [candidates[index] for index in order] + candidates[6:]
    last = race(shuffled, measure, 8, LIMITS)[-1]
    assert last[0].candidate is planted
    assert [one.candidate.name for one in last] == [
        one.candidate.name for one in race(candidates, measure, 8, LIMITS)[-1]
    ]


def test_all_candidates_of_a_rung_see_the_same_number_of_examples_and_half_of_them_leave() -> None:
    candidates = [weighted_sum(f"c{number}", "sum", [number]) for number in range(16)]
    history = race(candidates, lambda one, k: standing(one, [float(one.factors[0])] * k), 8, LIMITS)
    assert [(one[0].outcome.k, len(one)) for one in history] == [(2, 16), (4, 8), (8, 4)]
    assert {one.outcome.k for one in history[1]} == {4}
    assert (rungs(1), rungs(2), rungs(12)) == ([1], [2], [2, 4, 8, 12])


def test_a_race_ends_where_its_budget_does() -> None:
    candidates = [weighted_sum(f"c{number}", "sum", [number]) for number in range(4)]
    asked: list[int] = []
    history = race(
        candidates, lambda one, k: standing(one, [1.0] * k), 8, LIMITS, lambda count: not asked.append(count) and False
    )
    assert ([one[0].outcome.k for one in history], asked) == ([2], [3 * 2])


def test_of_nearly_equal_ones_the_simplest_wins_and_any_within_the_limits_beats_one_beyond() -> None:
    simple, better, beyond = (weighted_sum(name, "sum", [1]) for name in ("simple", "better", "beyond"))
    limits = Limits(loss=0.5, answers=0.0)
    standings = [standing(simple, [0.52] * 4), standing(better, [0.5] * 4), standing(beyond, [0.1] * 4, alone=-0.6)]
    ordered = simplest_of_the_best(standings, limits)
    assert [one.candidate.name for one in ordered] == ["simple", "better", "beyond"]
    assert ordered[2].excess(limits) > 0


def test_a_member_that_gained_nothing_counts_as_if_it_had_gained_a_little() -> None:
    nothing = standing(weighted_sum("sum", "sum", [1]), [3.1] * 4, alone=3.0)
    assert nothing.kept == [pytest.approx(-0.1 / LEAST_GAIN)]


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
    result = proposed(points, (5.0, 5.0), (0.3, 0.3), LEAST_GAIN, seed=0)
    assert result is not None
    assert np.allclose(result, (0.7, 0.7), atol=0.051)


def test_too_few_points_or_points_on_a_line_give_no_surface() -> None:
    few = [Point((float(number), 0.0), (1.0, 1.0)) for number in range(unknowns(2) - 1)]
    line = [Point((number / 7, number / 7), (1.0, 1.0)) for number in range(8)]
    assert proposed(few, (2.0, 2.0), (1.0, 1.0), LEAST_GAIN, 0) is None
    assert proposed(line, (2.0, 2.0), (1.0, 1.0), LEAST_GAIN, 0) is None


def test_a_journal_is_read_again_after_a_torn_last_line_and_refuses_another_problem(tmp_path: Path) -> None:
    path = tmp_path / "search.jsonl"
    key, measured = ("mean", "suite", "example"), Measured(0.1 + 0.2, 3, exact=True)
    Journal(path, "one").add([(key, measured)])
    with path.open("a") as file:
        file.write('["mean", "suite", "oth')
    again = Journal(path, "one")
    assert again.known == {key: measured}
    again.add([(("sum", "suite", "example"), measured)])
    assert len(Journal(path, "one").known) == 2
    with pytest.raises(RefusedOutput, match="another problem"):
        Journal(path, "two")
