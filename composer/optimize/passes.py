"""Runs passes of a search that another process names, with the same batches, so that every bit is the same."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import get_args

from composer.conflicts.evidence.bench import ALONE, BASE, WEIGHTED, Asked, Pass, Runner, weighted
from composer.deltas.delta import Delta
from composer.evaluation.hooks import Deltas
from composer.evaluation.measure import Measured
from composer.formats.recipes.calibration_sets import example_digest
from composer.optimize.candidates import Candidate
from composer.optimize.combiner import Combiner, FitOn
from composer.optimize.problem import Problem


class PassRunner:
    """Runs passes of the problem's search by their `who` and the digests of suites and examples. What a fit observes
    is kept for the next pass."""

    def __init__(self, problem: Problem, progress: Callable[[int], None] = lambda _count: None) -> None:
        self._combiner = Combiner(problem, progress)
        self._members = {one.adapter.name: one for one in problem.members}
        self._run = Runner(problem.load, progress)
        self._asked: dict[tuple[str, str], Asked] = {
            (digest, example_digest(example)): (split.suite, example)
            for digest, split in problem.splits.items()
            for example in (*split.search, *split.confirm)
        }

    def __call__(self, who: str, asked: Sequence[tuple[str, str]]) -> list[Measured]:
        """The results of the examples, in order. Raises what `Combiner.deltas` and `Runner` raise, and KeyError for an
        example that is not of the problem."""
        return self._run(Pass(who, partial(self._deltas, who), [self._asked[key] for key in asked]))

    def _deltas(self, who: str) -> Deltas:
        if who == BASE:
            return list[Delta]()
        if who.startswith(ALONE):
            return self._members[who.removeprefix(ALONE)].adapter.deltas
        if who.startswith(WEIGHTED):
            member = self._members[who.removeprefix(WEIGHTED)]
            return weighted(member.adapter.deltas, member.weight)
        (method, settings, factors), end = json.JSONDecoder().raw_decode(who)
        candidate = Candidate(name=who, family="", method=method, factors=tuple(factors), settings=settings)
        fit_on: FitOn = next((part for part in get_args(FitOn) if part == who[end:].strip()), "all")
        return self._combiner.deltas(candidate, fit_on)
