"""Measure what a search for a combination is worth: sets of two and three study adapters.

    python examples/train.py study --base BASE --out ADAPTERS
    python examples/train.py fresh --base BASE --out ADAPTERS
    python examples/optimize_sets.py --base BASE --adapters ADAPTERS --out ROWS.jsonl

For each set, this runs the search of `adaptory conflicts --optimize`. Then it measures every candidate on the unseen
examples: one half selects the best candidate in hindsight, and the other half scores it. The regret is the difference
between its score there and that of the search's choice, as a share of the worst member's gain. Writes a line of JSON
for each set, and prints the table that docs/methods/study.md has, with the time of each search.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from time import process_time
from typing import Any

import study_sets
from study_sets import member, suite_of
from tasks import TASKS

from composer.conflicts.evidence.bench import Bench, Probed, Runner
from composer.conflicts.evidence.outcome import Effect, effect_of
from composer.evaluation.model import LoadedModel, load_model
from composer.optimize.candidates import Candidate
from composer.optimize.combiner import Combiner
from composer.optimize.objective import kept_share
from composer.optimize.optimize import SearchJournal, optimize
from composer.optimize.problem import SearchEffort, SearchMember, SearchProblem
from composer.optimize.report import OptimizeReport, headline

SETS = (
    ("sql-migration-1.1", "terraform-review"),
    ("terraform-review", "support-macros"),
    ("alerts", "sorting"),
    ("orders", "travel"),
    ("bumps", "alerts"),
    ("sorting", "travel"),
    ("orders", "cron"),
    ("sql-migration-1.1", "terraform-review", "support-macros"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="the directory make_base.py wrote")
    parser.add_argument("--adapters", type=Path, required=True, help="where train.py put the study's adapters")
    parser.add_argument("--out", type=Path, required=True, help="a file of rows; an existing one is continued")
    chosen = parser.parse_args()
    rows = [json.loads(line) for line in chosen.out.read_text().splitlines()] if chosen.out.exists() else []
    done = {tuple(row["members"]) for row in rows}
    loaded = load_model(chosen.base, "cpu")
    with chosen.out.open("a") as out:
        for names in [names for names in SETS if names not in done]:
            rows.append(searched(loaded, [member(loaded, chosen.adapters, name) for name in names], names))
            out.write(json.dumps(rows[-1]) + "\n")
            out.flush()
            print(rows[-1], flush=True)
    for line in table(rows):
        print(line)


def searched(loaded: LoadedModel, members: Sequence[study_sets.Member], names: Sequence[str]) -> dict[str, Any]:
    """The search's result on a set, and its regret."""
    own = [
        SearchMember(adapter=replace(one.adapter, name=name), suite=one.suite)
        for one, name in zip(members, names, strict=True)
    ]
    problem = SearchProblem(
        load=lambda: loaded, members=own, guards=[suite_of(TASKS["guard"])], effort=SearchEffort(thorough=True)
    )
    with TemporaryDirectory() as directory:
        journal = Path(directory) / "search.jsonl"
        begun = process_time()
        report = optimize(problem, journal=journal)
        cpu_s = process_time() - begun
        bench = Bench(Runner(problem.load), SearchJournal(journal, problem.name))
        combiner = Combiner(problem, lambda _count: None)
        values = {trial.candidate.key: unseen(bench, combiner, problem, trial.candidate) for trial in report.tried}
    first, second = ({key: value[half] for key, value in values.items()} for half in (0, 1))
    picked = max(first, key=lambda key: first[key])
    winner = next(trial.candidate for trial in report.tried if trial.candidate.name == report.best[0].candidate.name)
    return {
        "members": list(names),
        "headline": headline(report),
        "choice": report.choice.name if report.choice else None,
        "first": report.best[0].candidate.name,
        "kept": worst_kept(report, report.best[0].candidate.name),
        "exact": answers(report, report.best[0].candidate.name),
        "mean_kept": worst_kept(report, "mean"),
        "mean_exact": answers(report, "mean"),
        "regret": round(second[picked] - second[winner.key], 4),
        "best_in_hindsight": next(trial.candidate.name for trial in report.tried if trial.candidate.key == picked),
        "search_s": round(report.search_s),
        "confirm_s": round(report.confirm_s),
        "cpu_s": round(cpu_s),
        "passes": report.passes,
    }


def worst_kept(report: OptimizeReport, name: str) -> float:
    return round(next(standing.worst_kept for standing in report.best if standing.candidate.name == name), 4)


def answers(report: OptimizeReport, name: str) -> list[list[int]]:
    """For each member: exact matches retained, and those that it gives alone."""
    confirmed = next(standing for standing in report.best if standing.candidate.name == name)
    return [[effect.still_answered, effect.answered] for effect in confirmed.outcome.effects]


def unseen(bench: Bench, combiner: Combiner, problem: SearchProblem, candidate: Candidate) -> tuple[float, float]:
    """The worst member's kept share on each half of the unseen examples, fitted on all search examples. What the
    search has confirmed is in the bench's record."""
    if candidate.is_fitted:
        candidate = replace(candidate, settings={**candidate.settings, "examples": problem.searched})
    members = [Probed(own.adapter.name, own.adapter.deltas, 1.0, own.suite) for own in problem.members]
    references = bench.references(
        members, [], lambda suite: problem.splits[suite.digest].confirm[: problem.effort.confirm]
    )
    combined = bench.run(candidate.key, lambda: combiner.deltas(candidate), references.rows)
    halves: list[float] = []
    for half in (slice(0, None, 2), slice(1, None, 2)):
        effects: list[Effect] = []
        for own in members:
            base, alone, together = (
                run[own.suite.digest][half] for run in (references.base, references.alone[own.name], combined)
            )
            effects.append(effect_of((own.name, own.suite.name), base, alone, together, members=1))
        halves.append(min(map(kept_share, effects)))
    return halves[0], halves[1]


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown: what the search's first and the mean keep of the worst member, with exact matches, and the regret."""
    lines = [
        "| members | the search's first | kept | exact match | mean: kept | exact match | regret | wall | CPU |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {' + '.join(row['members'])} | {row['first']}{'' if row['choice'] else ' (breaks a limit)'} "
        f"| {row['kept']:.3f} | {_counts(row['exact'])} | {row['mean_kept']:.3f} | {_counts(row['mean_exact'])} "
        f"| {row['regret']:+.3f} | {row['search_s']} + {row['confirm_s']} s | {_seconds(row.get('cpu_s'))} |"
        for row in rows
    ]
    kept, regret = mean(row["kept"] for row in rows), mean(row["regret"] for row in rows)
    return [*lines, "", f"mean: kept {kept:.3f}, regret {regret:+.4f}"]


def _seconds(value: int | None) -> str:
    return "" if value is None else f"{value} s"


def _counts(exact: Sequence[Sequence[int]]) -> str:
    return ", ".join(f"{left} of {alone}" for left, alone in exact)


if __name__ == "__main__":
    main()
