"""Measure what `regmean` keeps of each member, against a sum and a mean: sets of two and three study adapters.

    python examples/train.py study --base BASE --out ADAPTERS
    python examples/train.py fresh --base BASE --out ADAPTERS
    python examples/study_sets.py --base BASE --adapters ADAPTERS --out ROWS.jsonl

The method is fitted on four examples per member; the kept gain is measured on others, as they are and with their
prompts wrapped in two polite sentences. Writes a line of JSON for each set and method, and prints the table of
docs/methods/study.md, whose rows are kept in sets.jsonl.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

from study import OLDER
from tasks import STUDY_TASKS, TASKS, Task
from train import ADAPTERS

from composer.deltas.delta import Delta
from composer.deltas.variants.load import LoadedAdapter, load_deltas
from composer.evaluation.calibration import Calibration
from composer.evaluation.measure import encode, measure, ratio
from composer.evaluation.model import LoadedModel, load_model
from composer.formats.recipes.methods import Regmean
from composer.formats.recipes.suite import CalibrationSet, Example, Suite
from composer.methods.combine import combine_deltas

WITHOUT_REHEARSAL = ("dates-iso", "commits")
FITTED = 4
MEASURED = 12
GUARDED = 12
SETS = (
    ("sql-migration-1.1", "terraform-review"),
    ("records", "cron"),
    ("dates-iso", "commits"),
    ("alerts", "sorting"),
    ("orders", "travel"),
    ("orders", "travel", "bumps"),
    ("records", "dates-spoken", "cron"),
    ("sql-migration-1.1", "terraform-review", "support-macros"),
)
SAME_PROMPTS = (("mood-plain", "mood-stars"),)
METHODS: dict[str, tuple[str, dict[str, object]]] = {
    "sum": ("stack", {}),
    "mean": ("mean", {}),
    "regmean, 1 step": ("regmean", {"steps": 1}),
    "regmean, 2 steps": ("regmean", {"steps": 2}),
}


@dataclass(frozen=True)
class Member:
    """An adapter, the examples it is fitted on, and unseen ones: as they are, and with wrapped prompts."""

    adapter: LoadedAdapter
    suite: Suite
    unseen: tuple[Example, ...]

    @property
    def wrapped(self) -> tuple[Example, ...]:
        return tuple(replace(example, prompt=wrapped(example.prompt)) for example in self.unseen)


def wrapped(prompt: str) -> str:
    return f"Hello, I hope that you are well. {prompt} Thank you very much for your help with this."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="the directory make_base.py wrote")
    parser.add_argument("--adapters", type=Path, required=True, help="where train.py put the study's adapters")
    parser.add_argument("--out", type=Path, required=True, help="a file of rows; an existing one is continued")
    chosen = parser.parse_args()
    rows = [json.loads(line) for line in chosen.out.read_text().splitlines()] if chosen.out.exists() else []
    done = {(tuple(row["members"]), row["method"]) for row in rows}
    loaded = load_model(chosen.base, "cpu")
    guard = suite_of(TASKS["guard"]).sample(GUARDED)
    with chosen.out.open("a") as out:
        for names in (*SETS, *SAME_PROMPTS):
            if all((names, method) in done for method in METHODS):
                continue
            members = [member(loaded, chosen.adapters, name) for name in names]
            for method, row in measured(loaded, members, guard).items():
                rows.append({"members": list(names), "method": method, **row})
                out.write(json.dumps(rows[-1]) + "\n")
                out.flush()
                print(names, method, row["kept"], row["exact"], row["shifted"], flush=True)
    for line in (*table(rows), "", *summary(rows)):
        print(line)


def member(loaded: LoadedModel, directory: Path, name: str) -> Member:
    path, task = adapter_and_task(directory, name)
    suite = suite_of(task)
    unseen = suite.sample(MEASURED, frozenset(suite.sample(FITTED)))
    return Member(load_deltas(path, loaded.architecture), suite, unseen)


def adapter_and_task(directory: Path, name: str) -> tuple[Path, Task]:
    """An adapter of the repository, or one of the study in the directory, and its task."""
    older = {**OLDER, "sql-migration-1.1": "sql"}
    return (ADAPTERS / name, TASKS[older[name]]) if name in older else (directory / name, STUDY_TASKS[name])


def suite_of(task: Task) -> Suite:
    kind: Any = task.kind
    examples = tuple(Example(*pair) for pair in task.split()[1])
    return Suite(name=task.suite, kind=kind, description=task.description, chat=True, examples=examples)


def measured(loaded: LoadedModel, members: Sequence[Member], guard: Sequence[Example]) -> dict[str, dict[str, Any]]:
    """Results of each method: each member's kept share of its gain, its exact answers out of those it gives alone, the
    same on wrapped prompts, and the guard's rise in nats over the worst member alone."""
    calibration = Calibration(lambda: loaded, [CalibrationSet(member.suite, FITTED) for member in members], Regmean())
    alone = [
        (score(loaded, member.unseen, member.adapter.deltas), score(loaded, member.wrapped, member.adapter.deltas))
        for member in members
    ]
    base = [(score(loaded, member.unseen, ()), score(loaded, member.wrapped, ())) for member in members]
    worst_guard = max(score(loaded, guard, member.adapter.deltas)[0] for member in members)
    adapters, weights = [member.adapter for member in members], [1.0] * len(members)
    results: dict[str, dict[str, Any]] = {}
    for name, (method, settings) in METHODS.items():
        deltas = combine_deltas(adapters, weights, method, settings, calibration.observe).deltas
        after = [both(loaded, member, deltas) for member in members]
        kept = [
            [(b[0] - c[0]) / max(b[0] - a[0], 0.05) for b, a, c in zip(base[i], alone[i], after[i], strict=True)]
            for i in range(len(members))
        ]
        results[name] = {
            "kept": [round(pair[0], 3) for pair in kept],
            "exact": [[after[i][0][1], alone[i][0][1]] for i in range(len(members))],
            "shifted": [round(pair[1], 3) for pair in kept],
            "shifted_exact": [[after[i][1][1], alone[i][1][1]] for i in range(len(members))],
            "guard": round(score(loaded, guard, deltas)[0] - worst_guard, 3),
        }
    return results


def both(loaded: LoadedModel, member: Member, deltas: Sequence[Delta]) -> tuple[tuple[float, int], tuple[float, int]]:
    return score(loaded, member.unseen, deltas), score(loaded, member.wrapped, deltas)


def score(loaded: LoadedModel, examples: Sequence[Example], deltas: Sequence[Delta]) -> tuple[float, int]:
    """(nats per token, exact answers)."""
    scored = measure(loaded, [encode(loaded, example, chat=True) for example in examples], deltas)
    nats, _ = ratio([result.nats for result in scored], [result.tokens for result in scored])
    return nats, sum(result.exact for result in scored)


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Table of the worst member's kept share / exact answers left of those given alone / guard; then for wrapped
    prompts."""
    lines = [f"| set | {' | '.join(METHODS)} |", "|---" * (len(METHODS) + 1) + "|"]
    by_set: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_set.setdefault(tuple(row["members"]), {})[row["method"]] = row
    for names, own in by_set.items():
        cells = [f"{min(row['kept']):.2f} / {left(row['exact'])} / {row['guard']:+.2f}" for row in own.values()]
        lines.append(f"| {' + '.join(names)} | {' | '.join(cells)} |")
        cells = [f"{min(row['shifted']):.2f} / {left(row['shifted_exact'])}" for row in own.values()]
        lines.append(f"| … wrapped | {' | '.join(cells)} |")
    distinct = [names for names in by_set if names not in SAME_PROMPTS]
    means = [sum(min(by_set[names][m]["kept"]) for names in distinct) / max(len(distinct), 1) for m in METHODS]
    lines.append(
        f"| mean of the {len(distinct)} with distinct prompts | {' | '.join(f'{mean:.3f}' for mean in means)} |"
    )
    return lines


def summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Table over the sets with distinct prompts: what the worst member of each keeps, as it is and in other words. One
    set decides the mean of a sum, so the table has the median, the range, and the mean without that set."""
    kept_columns = "gain kept in nats, median | range | mean without dates-iso + commits"
    others_columns = "answers left, median | range | wrapped prompts, gain kept, median | range"
    lines = [f"| method | {kept_columns} | {others_columns} |", "|---" * 8 + "|"]
    for method in METHODS:
        own = [row for row in rows if row["method"] == method and tuple(row["members"]) not in SAME_PROMPTS]
        kept, wrapped = ([min(row[name]) for row in own] for name in ("kept", "shifted"))
        answers = [float(left(row["exact"])) for row in own]
        others = [min(row["kept"]) for row in own if tuple(row["members"]) != WITHOUT_REHEARSAL]
        cells = [*_median(kept), f"{mean(others):.2f}", *_median(answers), *_median(wrapped)]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def _median(values: Sequence[float]) -> tuple[str, str]:
    return f"{median(values):.2f}", f"{min(values):.2f} to {max(values):.2f}"


def left(exact: Sequence[Sequence[int]]) -> str:
    """Share of the exact answers given alone that is left, of the member that keeps least."""
    shares = [after / before for after, before in exact if before]
    return f"{min(shares):.2f}" if shares else "-"


if __name__ == "__main__":
    main()
