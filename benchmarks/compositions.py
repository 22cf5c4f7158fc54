"""Retention of adapters in every kind of composition, and the errors of the choice: on examples that nothing saw.

python examples/train.py unrehearsed --base BASE --out ADAPTERS
python examples/train.py contradictory --base BASE --out ADAPTERS
python -m benchmarks.compositions BASE ADAPTERS RESULTS [--fresh 64]

RESULTS gets a file of JSON for each set and one for the adapters; a run continues after the last one. Prints the tables
of RESULTS.md. A member is fitted on 8 of the 32 examples of its suite, and measured on `--fresh` further ones, which
neither training, nor the fit, nor the choice has seen: as they are, and 16 of them in other words. The guard is fitted
on 8 of its 24 examples and measured on the others.
"""

import argparse
import json
import os
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import process_time
from typing import Any

import torch

from benchmarks.composition_tables import tables
from composer.conflicts.evidence.bench import Bench, Probed, Runner
from composer.deltas.delta import Delta
from composer.deltas.variants.load import load_deltas
from composer.evaluation.calibration import Calibration
from composer.evaluation.measure import ExampleScore
from composer.evaluation.model import LoadedModel, load_model
from composer.formats.recipes.methods import Regmean, parse_settings
from composer.formats.recipes.phrases import reworded
from composer.formats.recipes.recipe import TAMED
from composer.formats.recipes.suite import CalibrationSet, Example, Suite, guard_sets
from composer.methods.combine import combine_deltas
from composer.optimize.candidates import PLAIN_FIT, SELECTOR, Candidate, as_set, fitted, low_rank
from composer.optimize.combiner import Combiner
from composer.optimize.optimize import SearchJournal, optimize
from composer.optimize.problem import SearchMember, SearchProblem
from composer.optimize.report import headline
from composer.optimize.routing import SetRouting

SETS = (
    ("dates-iso", "records"),
    ("cron", "commits"),
    ("dates-short", "mood-stars"),
    ("records-lines", "mood-plain"),
    ("dates-iso", "records", "cron"),
    ("commits", "records-lines", "dates-short"),
    ("records", "records-lines"),
    ("dates-iso", "records", "cron", "commits", "mood-plain"),
)
PHRASES = {
    "dates-iso": "As in ISO 8601.",
    "dates-short": "In short.",
    "records": "As JSON.",
    "records-lines": "As a line.",
    "mood-plain": "In words.",
    "mood-stars": "In stars.",
    "cron": "For cron.",
    "commits": "As a commit message.",
}
REWORDED = 16


@dataclass(frozen=True)
class Tasks:
    """The suites of the adapters by name, the guard, and further examples of each adapter's task."""

    suites: Mapping[str, Suite]
    fresh: Mapping[str, tuple[Example, ...]]
    guard: Suite

    @classmethod
    def of(cls, names: Sequence[str], fresh: int) -> "Tasks":
        sys.path.insert(0, "examples")
        from study_sets import suite_of
        from tasks import STUDY_TASKS, TASKS

        suites = {name: suite_of(STUDY_TASKS[name]) for name in names}
        further = {name: STUDY_TASKS[name].unseen()[suites[name].count :] for name in names}
        return cls(
            suites,
            {name: tuple(Example(*pair) for pair in pairs[:fresh]) for name, pairs in further.items()},
            suite_of(TASKS["guard"]),
        )


@dataclass(frozen=True)
class Study:
    """The base and the adapters, and where results are kept."""

    loaded: LoadedModel
    adapters: Path
    results: Path
    tasks: Tasks

    def probed(self, name: str) -> Probed:
        adapter = load_deltas(self.adapters / f"{name}-unrehearsed", self.loaded.architecture)
        return Probed(name, adapter.deltas, 1.0, self.tasks.suites[name])

    def bench(self, name: str) -> Bench:
        """Measures what no earlier run has, which the file of that name records."""
        return Bench(Runner(lambda: self.loaded), SearchJournal(self.results / f"{name}.jsonl", name))

    def kept(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The results of an earlier run, or those that are measured now."""
        path = self.results / f"{name}.json"
        if not path.exists():
            document = measure() | {"load": os.getloadavg()[0]}
            part = path.with_suffix(".part")
            part.write_text(json.dumps(document))
            part.replace(path)
            print(f"measured {name}: load average {document['load']:.1f}", file=sys.stderr, flush=True)
        return json.loads(path.read_text())

    def measured_set(self, names: Sequence[str]) -> dict[str, Any]:
        """The rows of each member's fresh examples, of reworded ones, and of the guard's, by candidate, and the CPU
        seconds that each fit took."""
        problem = self.problem(names)
        combiner, name = Combiner(problem, lambda _count: None), "+".join(names)
        references, bench = self.bench("references"), self.bench(name)
        members = [self.probed(own) for own in names]
        routing = SetRouting(problem, members)
        guard = problem.splits[self.tasks.guard.digest].confirm
        document: dict[str, Any] = {"members": list(names), "candidates": {}}
        for words in ("fresh", "reworded"):
            own, examples = self._in(words, members)
            by_suite = references.references(
                own,
                [self.tasks.guard] if words == "fresh" else [],
                lambda suite, own=examples: own.get(suite.digest, guard),
            )
            document[words] = {
                "base": _json(by_suite.base),
                "alone": {one: _json(rows) for one, rows in by_suite.alone.items()},
                "suites": {member.name: member.suite.digest for member in own},
            }
            for label, candidate in self.candidates(problem, names).items():
                known = document["candidates"].setdefault(label, {"cpu_s": 0.0})
                begun = process_time()
                if candidate.is_set:
                    known[words] = _json(routing.results(references, by_suite))
                    continue
                combiner.deltas(candidate)
                known["cpu_s"] += process_time() - begun
                asked = replace(problem, members=self._with_suites(problem, own))
                rows = [asked.asked(candidate.phrases, *row) for row in by_suite.rows]
                results = bench.run(candidate.key, lambda candidate=candidate: combiner.deltas(candidate), rows)
                digests = {before.digest: now.digest for (before, _), (now, _) in zip(by_suite.rows, rows, strict=True)}
                known[words] = {suite: _rows(results[now]) for suite, now in digests.items()}
        return document | {"guard": self.tasks.guard.digest}

    def candidates(self, problem: SearchProblem, names: Sequence[str]) -> dict[str, Candidate]:
        """The candidates by the words of the table. The fitted ones use all search examples."""
        count, given = len(names), {"examples": problem.searched}
        sums = {candidate.name: candidate for candidate in low_rank(count)}
        fit = next(candidate for candidate in fitted(count) if candidate.name == PLAIN_FIT)
        fit = replace(fit, settings={**fit.settings, **given})
        phrases = tuple(PHRASES[name] for name in names)
        return {
            "mean": next(candidate for candidate in sums.values() if candidate.family == "mean"),
            "sum": sums["sum"],
            "regmean without a guard": replace(fit, settings={**fit.settings, "guard": 0.0}),
            "regmean (default)": fit,
            "selector": replace(fit, family=SELECTOR, phrases=phrases),
            "set": as_set(count),
        }

    def problem(self, names: Sequence[str]) -> SearchProblem:
        architecture = self.loaded.architecture
        members = [
            SearchMember(
                adapter=replace(load_deltas(self.adapters / f"{name}-unrehearsed", architecture), name=name),
                suite=self.tasks.suites[name],
            )
            for name in names
        ]
        return SearchProblem(load=lambda: self.loaded, members=members, guards=[self.tasks.guard])

    def searched(self, names: Sequence[str]) -> dict[str, Any]:
        """The answer of `conflicts --optimize`, and its CPU seconds."""
        problem, begun = self.problem(names), process_time()
        report = optimize(replace(problem, may_be_set=True))
        verdicts = {row.candidate.name: str(row.verdict) for row in report.best}
        choice = report.choice
        return {
            "headline": headline(report),
            "choice": choice.name if choice else None,
            "answer": next((row.answer for row in report.best if row.candidate == choice), None),
            "verdicts": verdicts,
            "cpu_s": process_time() - begun,
        }

    def measured_adapters(self, names: Sequence[str]) -> dict[str, Any]:
        """The rows of each adapter as it is, and tamed, on fresh examples, reworded ones, and the guard's others."""
        bench, guards = self.bench("adapters"), guard_sets([self.tasks.guard])
        others = self.tasks.guard.sample(None, without=frozenset(guards[0].examples))
        rows: dict[str, Any] = {}
        for name in names:
            member, begun = self.probed(name), process_time()
            tamed = self.tamed(name, guards)
            cpu_s = process_time() - begun
            asked = {"fresh": (member.suite, self.tasks.fresh[name]), "guard": (self.tasks.guard, others)}
            if wrapped := reworded(member.suite, self.tasks.fresh[name][:REWORDED]):
                asked["reworded"] = (wrapped, wrapped.examples)
            rows[name] = {"cpu_s": cpu_s}
            for words, (suite, examples) in asked.items():
                given = [(suite, example) for example in examples]
                runs = {"base": (), "original": member.deltas, "tamed": tamed}
                rows[name][words] = {
                    of: _rows(
                        bench.run(of if of == "base" else f"{of} {name}", lambda deltas=deltas: deltas, given)[
                            suite.digest
                        ]
                    )
                    for of, deltas in runs.items()
                }
        return {"adapters": rows}

    def tamed(self, name: str, guards: Sequence[CalibrationSet]) -> Sequence[Delta]:
        """The deltas that `adaptory tame` makes."""
        settings = parse_settings("regmean", TAMED)
        assert isinstance(settings, Regmean)
        own = [CalibrationSet.of_member(self.tasks.suites[name], settings.examples)]
        calibration = Calibration(lambda: self.loaded, own, settings, guards=guards)
        adapter = load_deltas(self.adapters / f"{name}-unrehearsed", self.loaded.architecture)
        return combine_deltas([adapter], [1.0], "regmean", TAMED, calibration.observe).deltas

    def _in(self, words: str, members: Sequence[Probed]) -> tuple[list[Probed], dict[str, tuple[Example, ...]]]:
        """The members, and their fresh examples by the digest of their suites: as they are, or reworded."""
        if words == "fresh":
            return [*members], {member.suite.digest: self.tasks.fresh[member.name] for member in members}
        own: list[Probed] = []
        for member in members:
            suite = reworded(member.suite, self.tasks.fresh[member.name][:REWORDED])
            own += [replace(member, suite=suite)] if suite else []
        return own, {member.suite.digest: member.suite.examples for member in own}

    @staticmethod
    def _with_suites(problem: SearchProblem, own: Sequence[Probed]) -> list[SearchMember]:
        return [replace(member, suite=one.suite) for member, one in zip(problem.members, own, strict=True)]


def _json(results: Mapping[str, Sequence[ExampleScore]]) -> dict[str, Any]:
    return {suite: _rows(rows) for suite, rows in results.items()}


def _rows(rows: Sequence[ExampleScore]) -> list[tuple[float, int, bool | None]]:
    return [(row.nats, row.tokens, row.exact) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="the directory make_base.py wrote")
    parser.add_argument("adapters", type=Path, help="where train.py put the adapters")
    parser.add_argument("results", type=Path, help="a directory of results; an earlier run's are continued")
    parser.add_argument("--fresh", type=int, default=64, help="examples of each member that nothing has seen, up to 64")
    parser.add_argument("--draws", type=int, default=50, help="resampled suites, by which choices are judged")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    chosen.results.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(name for members in SETS for name in members))
    study = Study(load_model(chosen.base, "cpu"), chosen.adapters, chosen.results, Tasks.of(names, chosen.fresh))
    adapters = study.kept("adapters", lambda: study.measured_adapters(names))
    sets: list[dict[str, Any]] = []
    for members in SETS:
        name = "+".join(members)
        sets.append(study.kept(name, lambda members=members: study.measured_set(members)))
        sets[-1]["search"] = study.kept(f"{name} search", lambda members=members: study.searched(members))
    draw = random.Random(0)  # noqa: S311 - reproducible, not a secret
    for line in tables(sets, adapters["adapters"], draw, chosen.draws):
        print(line)


if __name__ == "__main__":
    main()
