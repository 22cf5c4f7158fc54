"""What a search says of its members as a set: each prompt under the member that a router chooses."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from composer.conflicts.evidence.outcome import Limits
from composer.findings import Verdict
from composer.formats.recipes.suite import Suite
from composer.optimize.optimize import optimize
from composer.optimize.problem import SearchProblem
from composer.optimize.report import AS_SET, Confirmed, OptimizeReport, choose
from tests.composer.optimize.test_optimize import EFFORT, problem

__all__ = ["problem"]
STRICT = Limits(loss=1e-6, answers=1.0, guard=1e6)


def with_own_words(suite: Suite) -> Suite:
    """The suite with prompts that name their task."""
    examples = tuple(replace(example, prompt=f"{suite.name}: {example.prompt}") for example in suite.examples)
    return Suite(**{**suite.content, "examples": examples})  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def strict(problem: SearchProblem) -> SearchProblem:
    """A problem that no combination solves, and whose prompts tell the members apart."""
    members = [replace(member, suite=with_own_words(member.suite)) for member in problem.members]
    effort = replace(EFFORT, thorough=False, confirm=8, passes=400)
    return replace(problem, members=members, limits=STRICT, effort=effort)


@pytest.fixture(scope="module")
def report(strict: SearchProblem) -> OptimizeReport:
    return optimize(replace(strict, may_be_set=True))


def of_set(report: OptimizeReport) -> Confirmed:
    return next(row for row in report.best if row.answer == AS_SET)


def test_where_no_single_adapter_fits_a_set_of_the_members_is_chosen(report: OptimizeReport) -> None:
    assert report.choice is not None
    assert report.choice.is_set
    assert [(row.name, row.right, row.count) for row in report.routed[:2]] == [("red", 8, 8), ("blue", 8, 8)]
    for effect in of_set(report).outcome.effects:
        assert effect.combined == pytest.approx(effect.alone, abs=1e-6), "each member answers as it does alone"
    shown = report.to_json()
    assert str(shown["headline"]).startswith("a set: members with a router")
    assert shown["choice"] == {**report.choice.to_json(), "method": "set"}


def test_a_set_that_may_not_be_published_is_named_beside_what_fails(strict: SearchProblem) -> None:
    report = optimize(strict)
    assert report.choice is None
    assert of_set(report).verdict is Verdict.UNDECIDED, "8 examples do not prove that every answer is left"
    assert str(report.to_json()["headline"]).endswith("a set with a router may keep the limits")
    assert "may keep the limits: add `set: NAMESPACE/NAME:VERSION`" in str(report.to_json()["offers"])


def test_one_adapter_that_may_be_used_is_preferred_to_a_set(report: OptimizeReport) -> None:
    single = next(row for row in report.best if row.answer != AS_SET)
    undecided = replace(single, verdict=Verdict.UNDECIDED)
    assert choose([of_set(report), undecided], may_be_set=True) == undecided.candidate
    assert choose([of_set(report), single], may_be_set=False) is None


def test_prompts_of_a_member_that_the_router_confuses_are_measured_under_the_other(strict: SearchProblem) -> None:
    red, blue = strict.members
    pairs = zip(red.suite.examples, blue.suite.examples, strict=True)
    examples = tuple(replace(own, prompt=f"{other.prompt}.") for other, own in pairs)
    alike = Suite(**{**blue.suite.content, "examples": examples})  # pyright: ignore[reportArgumentType]
    confused = optimize(replace(strict, members=[red, replace(blue, suite=alike)], may_be_set=True))
    right = {row.name: row.right for row in confused.routed}
    assert right["red"] + right["blue"] < 16
    for effect in of_set(confused).outcome.effects:
        assert (effect.combined == pytest.approx(effect.alone, abs=1e-6)) == (right[effect.member] == 8)


def test_a_set_costs_no_pass_where_the_router_is_right(strict: SearchProblem, tmp_path: Path) -> None:
    optimize(strict, journal=tmp_path / "search.jsonl")
    rows = [row for line in (tmp_path / "search.jsonl").read_text().splitlines()[1:] for row in json.loads(line)]
    red, blue = (member.suite.digest for member in strict.members)
    assert {suite for who, suite, *_ in rows if who == "alone: red"} >= {red}
    assert blue not in {suite for who, suite, *_ in rows if who == "alone: red"}
