"""Combines the members by a candidate's method and weights. Keeps fits, since each takes seconds."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal, get_args

from composer.conflicts.evidence.bench import PassRunner, Probed, Runner
from composer.deltas.delta import Delta, LowRank
from composer.evaluation.calibration import Calibration
from composer.evaluation.hooks import Deltas
from composer.export.combine import refuse_uncombinable
from composer.formats.recipes.methods import Regmean
from composer.formats.recipes.suite import CalibrationSet, Suite
from composer.methods.combine import combine_parsed
from composer.methods.regmean import ModuleInputs, Observe
from composer.optimize.candidates import Candidate
from composer.optimize.problem import SearchProblem

FitOn = Literal["first half", "second half", "all"]
"""The search examples that a candidate is fitted on."""


class Combiner:
    """Makes the deltas of candidates. `progress` is called with 0 before each, and may raise."""

    def __init__(self, problem: SearchProblem, progress: Callable[[int], None]) -> None:
        self._problem, self._progress = problem, progress
        self._fitted: dict[tuple[str, FitOn], list[Delta]] = {}
        self._observed: dict[tuple[object, ...], Mapping[str, ModuleInputs]] = {}

    def deltas(self, candidate: Candidate, fit_on: FitOn = "all") -> Deltas:
        """The combined deltas; those of a fit are kept. Raises what `combine_parsed` and `refuse_uncombinable`
        raise."""
        key = candidate.key, fit_on
        if key in self._fitted:
            return self._fitted[key]
        self._progress(0)
        members = self._problem.members
        # In memory, each side of a tied weight is a separate module, whatever a merge does with it.
        adapters, settings = [member.loaded for member in members], candidate.parsed.with_tied("untie")
        weights = candidate.weights([member.weight for member in members])
        if self._problem.as_adapter:
            refuse_uncombinable(adapters, weights, settings)
        device = self._problem.load().device
        if not isinstance(settings, Regmean):
            return combine_parsed(adapters, weights, settings, device=device).deltas
        own = self._sets([member.suite for member in members], fit_on)
        if candidate.phrases:
            own = [replace(used, phrase=phrase) for used, phrase in zip(own, candidate.phrases, strict=True)]
        calibration = Calibration(
            self._problem.load,
            own,
            settings,
            lambda _count: self._progress(0),
            guards=[used for used in self._sets(self._problem.other_guards, fit_on) if len(used)],
        )
        observe = self._observe(calibration, candidate)
        self._fitted[key] = combine_parsed(adapters, weights, settings, observe, device).deltas
        return self._fitted[key]

    def forget_inputs(self) -> None:
        """Drops the inputs that fits on the same examples share."""
        self._observed.clear()

    def _sets(self, suites: Sequence[Suite], fit_on: FitOn) -> list[CalibrationSet]:
        """Each suite's examples to fit on. Those of a half leave out the other half's, since suites may share some."""
        problem, splits = self._problem, [self._problem.splits[suite.digest] for suite in suites]
        if fit_on == "all":
            return [split.searched for split in splits]
        first, second = slice(problem.searched // 2), slice(problem.searched // 2, None)
        part, other = (first, second) if fit_on == "first half" else (second, first)
        scored = {example for split in problem.splits.values() for example in split.search[other]}
        sets: list[CalibrationSet] = []
        for split in splits:
            examples = [example for example in split.search[part] if example not in scored]
            sets.append(CalibrationSet.of_member(split.part(examples), len(examples)) if examples else CalibrationSet())
        return sets

    def _observe(self, calibration: Calibration, candidate: Candidate) -> Observe:
        """Observes inputs. Every fit begins with those under each member's own deltas, which are remembered: all fits
        on the same examples share them."""
        begun: set[int | None] = set()
        tokens = (calibration.settings.tokens, calibration.settings.seed)

        def observe(
            member: int | None, active: Sequence[Delta], wanted: Mapping[str, LowRank]
        ) -> Mapping[str, ModuleInputs]:
            if member in begun:  # a second step, under the fitted deltas
                return calibration.observe(member, active, wanted)
            begun.add(member)
            used = calibration.guards if member is None else [calibration.sets[member]]
            key = (member, json.dumps([examples.to_json() for examples in used]), tokens, candidate.factors)
            if key not in self._observed:
                self._observed[key] = calibration.observe(member, active, wanted)
            return self._observed[key]

        return observe


# Runs the passes of a search that another process makes.


def pass_runner(problem: SearchProblem, progress: Callable[[int], None] = lambda _count: None) -> PassRunner:
    """Runs passes of the problem's search, and keeps what a fit observes for the next pass. Its calls raise what
    `Combiner.deltas` and `Runner` raise."""
    combiner = Combiner(problem, progress)
    members = [Probed(member.name, member.loaded.deltas, member.weight, member.suite) for member in problem.members]
    splits = problem.splits.values()
    rows = [(split.suite, example) for split in splits for example in (*split.search, *split.confirm)]
    rows += [(split.reworded, example) for split in splits if split.reworded for example in split.reworded.examples]
    rows += [problem.asked(problem.phrases, *row) for row in rows] if problem.phrases else []

    def combined(who: str) -> Deltas:
        (method, _version, settings, factors, *phrases), end = json.JSONDecoder().raw_decode(who)
        candidate = Candidate(
            name=who,
            family="",
            method=method,
            factors=tuple(factors),
            settings=settings,
            phrases=tuple(phrases[0]) if phrases else (),
        )
        fit_on: FitOn = next((part for part in get_args(FitOn) if part == who[end:].strip()), "all")
        return combiner.deltas(candidate, fit_on)

    return PassRunner(Runner(problem.load, progress), members, rows, combined)
