"""Runs the passes of a search that another process makes."""

import json
from collections.abc import Callable
from typing import get_args

from composer.conflicts.evidence.bench import Probed, Runner
from composer.conflicts.evidence.passes import PassRunner
from composer.evaluation.hooks import Deltas
from composer.optimize.candidates import Candidate
from composer.optimize.combiner import Combiner, FitOn
from composer.optimize.problem import Problem


def pass_runner(problem: Problem, progress: Callable[[int], None] = lambda _count: None) -> PassRunner:
    """Runs passes of the problem's search, and keeps what a fit observes for the next pass. Its calls raise what
    `Combiner.deltas` and `Runner` raise."""
    combiner = Combiner(problem, progress)
    members = [Probed(one.adapter.name, one.adapter.deltas, one.weight, one.suite) for one in problem.members]
    rows = [(split.suite, example) for split in problem.splits.values() for example in (*split.search, *split.confirm)]

    def combined(who: str) -> Deltas:
        (method, _version, settings, factors), end = json.JSONDecoder().raw_decode(who)
        candidate = Candidate(name=who, family="", method=method, factors=tuple(factors), settings=settings)
        fit_on: FitOn = next((part for part in get_args(FitOn) if part == who[end:].strip()), "all")
        return combiner.deltas(candidate, fit_on)

    return PassRunner(Runner(problem.load, progress), members, rows, combined)
