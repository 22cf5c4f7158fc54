"""A search whose passes are run elsewhere, in another order: the same numbers and the same choice."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace

from composer.conflicts.evidence.bench import Pass
from composer.evaluation.measure import Measured
from composer.optimize.optimize import optimize
from composer.optimize.passes import PassRunner
from composer.optimize.problem import Problem
from composer.optimize.report import OptimizeReport
from tests.composer.optimize.test_optimize import decided, problem, report

__all__ = ["problem", "report"]  # fixtures


def asked(one: Pass) -> list[tuple[str, str]]:
    return [(suite, example) for _, suite, example in one.keys]


def test_passes_that_are_run_elsewhere_give_the_same_choice_with_the_same_numbers(
    problem: Problem, report: OptimizeReport
) -> None:
    elsewhere, rounds, alone = PassRunner(problem), list[int](), list[str]()

    def spread(passes: Sequence[Pass]) -> Iterator[tuple[Pass, Sequence[Measured]]]:
        rounds.append(len(passes))
        for one in reversed(passes):
            yield one, elsewhere(one.who, asked(one))

    def measure(one: Pass) -> Sequence[Measured]:
        alone.append(one.who)
        return elsewhere(one.who, asked(one))

    def without_a_model() -> object:
        raise AssertionError("the base was loaded here")

    here = replace(problem, load=without_a_model)  # pyright: ignore[reportArgumentType]
    spread_report = optimize(here, measure=measure, spread=spread)
    assert decided(spread_report) == decided(report)
    assert rounds[0] > 10, "the first round is spread"
    assert len(alone) < sum(rounds) / 4, "only what depends on another result is run alone"


def test_a_pass_that_cannot_be_spread_is_run_alone(problem: Problem, report: OptimizeReport) -> None:
    elsewhere = PassRunner(problem)

    def spread(passes: Sequence[Pass]) -> Iterator[tuple[Pass, Sequence[Measured]]]:
        for one in passes:
            if "tsv" not in one.who:
                yield one, elsewhere(one.who, asked(one))

    again = optimize(problem, measure=lambda one: elsewhere(one.who, asked(one)), spread=spread)
    assert json.dumps(decided(again)) == json.dumps(decided(report))
