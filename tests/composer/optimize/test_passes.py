"""A search whose passes are run elsewhere, in another order: the same numbers and the same choice."""

import json
from dataclasses import replace

import pytest

from composer.optimize.combiner import pass_runner
from composer.optimize.optimize import optimize
from composer.optimize.problem import SearchProblem
from composer.optimize.report import OptimizeReport
from tests.composer.elsewhere import Other
from tests.composer.optimize.test_optimize import decided, problem, report

__all__ = ["problem", "report"]  # fixtures


@pytest.mark.long
def test_passes_that_are_run_elsewhere_give_the_same_choice_with_the_same_numbers(
    problem: SearchProblem, report: OptimizeReport
) -> None:
    other = Other(pass_runner(problem))

    def without_a_model() -> object:
        raise AssertionError("the base was loaded here")

    here = replace(problem, load=without_a_model)  # pyright: ignore[reportArgumentType]
    spread_report = optimize(here, elsewhere=other)
    assert decided(spread_report) == decided(report)
    assert other.rounds[1] > 10, "the first round of the race is spread"
    assert len(other.alone) < sum(other.rounds) / 4, "only what depends on another result is run alone"


@pytest.mark.long
def test_a_pass_that_cannot_be_spread_is_run_alone(problem: SearchProblem, report: OptimizeReport) -> None:
    other = Other(pass_runner(problem), left_out="tsv")
    again = optimize(problem, elsewhere=other)
    assert any("tsv" in who for who in other.alone)
    assert json.dumps(decided(again)) == json.dumps(decided(report))
