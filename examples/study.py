"""Measure what predicts that two adapters hurt each other: every pair of a dozen small adapters, merged and evaluated.

    python examples/train.py study --base BASE --out ADAPTERS
    python examples/study.py --base BASE --adapters ADAPTERS --out MINE.jsonl

Writes one line of JSON per adapter and one per pair to `--out`, and continues where an earlier run stopped. Every
example of every suite is kept with its nats, its tokens and whether it was answered word for word, so that
`verdict_report.py` can replay the rule by which `adaptory conflicts` decides; `study_report.py` makes the tables of
docs/methods/study.md. The examples that a probe sees are kept separate from those on which the damage is measured.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from tasks import STUDY_TASKS, TASKS, Task
from train import ADAPTERS, FRESH, STUDY

from composer.conflicts.comparison import compare_all
from composer.conflicts.evidence.activations import activation_interference
from composer.conflicts.report import conflicts
from composer.deltas.lowrank import PairSums
from composer.deltas.variants.load import LoadedAdapter, load_deltas
from composer.evaluation.measure import Encoded, ExampleScore, encode, measure, ratio
from composer.evaluation.model import LoadedModel, load_model
from composer.formats.recipes.suite import Example, Suite
from composer.formats.recipes.weights import weights_of
from composer.methods.combine import combine_deltas

OLDER = {"sql-migration": "sql", "terraform-review": "terraform", "support-macros": "support"}
SMALL = [*STUDY, *FRESH]
METHODS: dict[str, tuple[str, float]] = {"sum": ("stack", 1.0), "mean": ("stack", 0.5), "ties": ("ties", 1.0)}
PROBED = (1, 2, 4, 8, 16)
MEASURED = 16
WATCHED = 4
"""Examples of the victim's suite, prompts with completions, on which activations are compared."""
GUARD = "guard"


@dataclass(frozen=True)
class Member:
    """An adapter and all examples of its suite, in the order in which a probe takes them: it sees the first ones, and
    the loss is measured on the last MEASURED."""

    adapter: LoadedAdapter
    examples: list[Encoded]

    @property
    def name(self) -> str:
        return self.adapter.name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="the directory make_base.py wrote")
    parser.add_argument("--adapters", type=Path, required=True, help="where train.py put the study's adapters")
    parser.add_argument("--out", type=Path, required=True, help="a file of rows; an existing one is continued")
    parser.add_argument("--only", nargs="+", default=[*OLDER, *SMALL], help="names of adapters; all by default")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS], help="all by default")
    chosen = parser.parse_args()
    directories = {name: ADAPTERS / name if name in OLDER else chosen.adapters / name for name in chosen.only}
    for directory in (chosen.base, *directories.values()):
        if not directory.is_dir():
            parser.error(f"{directory} does not exist: make_base.py and train.py write the base and the adapters.")
    loaded = load_model(chosen.base, "cpu")
    members = [_member(loaded, name, directory) for name, directory in directories.items()]
    guard = [encode(loaded, example, chat=True) for example in _in_order(_suite(TASKS["guard"]))]
    done = _rows(chosen.out)
    with chosen.out.open("a") as out:
        for row in _measured(loaded, members, guard, done, chosen.methods):
            out.write(_line(row))
            out.flush()
            worse = {method: round(one["worse"], 3) for method, one in row.get("losses", {}).items()}
            print(row.get("member") or (row["a"], row["b"], worse))


Key = tuple[str, ...]


def _measured(
    loaded: LoadedModel,
    members: Sequence[Member],
    guard: list[Encoded],
    done: Mapping[Key, Any],
    methods: Sequence[str],
) -> Iterator[dict[str, Any]]:
    """The rows that are still missing: the base on the guard, each adapter alone, every pair."""
    alone = dict(done)
    if (GUARD,) not in done:
        alone[GUARD,] = {"member": GUARD, "base": _kept(measure(loaded, guard))}
        yield alone[GUARD,]
    for member in members:
        if (member.name,) not in done:
            alone[member.name,] = {
                "member": member.name,
                "base": _kept(measure(loaded, member.examples)),
                "alone": _kept(measure(loaded, member.examples, member.adapter.deltas)),
                GUARD: _kept(measure(loaded, guard, member.adapter.deltas)),
            }
            yield alone[member.name,]
    for one, other in combinations(members, 2):
        if (one.name, other.name) in done:
            continue
        both = (one, other)
        row: dict[str, Any] = {"a": one.name, "b": other.name, "weights": weights_say(one, other)}
        row["activations"] = activations_say(loaded, one, other)
        row["combined"] = {method: combined(loaded, both, method, guard) for method in methods}
        row |= {run: {member.name: _nll(alone[member.name,][run]) for member in both} for run in ("base", "alone")}
        row["losses"] = {method: losses(both, row["combined"][method], alone) for method in methods}
        yield row


def _member(loaded: LoadedModel, name: str, directory: Path) -> Member:
    task = TASKS[OLDER[name]] if name in OLDER else STUDY_TASKS[name]
    encoded = [encode(loaded, example, chat=True) for example in _in_order(_suite(task))]
    return Member(load_deltas(directory, loaded.architecture), encoded)


def _in_order(suite: Suite) -> list[Example]:
    """All examples, so that the first k are those of `suite.sample(k)`."""
    first = suite.sample(len(suite.examples) - 1)
    return [*first, *(example for example in suite.examples if example not in first)]


def _suite(task: Task) -> Suite:
    held_out = task.unseen()
    examples = tuple(Example(prompt, completion) for prompt, completion in held_out)
    kind: Any = task.kind
    return Suite(name=task.suite, kind=kind, description=task.description, chat=True, examples=examples)


def _rows(path: Path) -> dict[Key, Any]:
    """Rows of an earlier run, by the name of the adapter or the names of the pair."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {(row["member"],) if "member" in row else (row["a"], row["b"]): row for row in rows}


def _kept(measured: Sequence[ExampleScore]) -> dict[str, Any]:
    """Nats and tokens of each example, and a 1 for each that is answered word for word."""
    return {
        "nats": [result.nats for result in measured],
        "tokens": [result.tokens for result in measured],
        "exact": "".join(str(int(result.exact)) for result in measured),
    }


def combined(
    loaded: LoadedModel, pair: tuple[Member, Member], method: str, guard: list[Encoded]
) -> dict[str, dict[str, Any]]:
    """Measures each member's examples and the guard's under the combination of the two."""
    name, weight = METHODS[method]
    deltas = combine_deltas([member.adapter for member in pair], [weight] * 2, name).deltas
    first, second = (len(member.examples) for member in pair)
    together = measure(loaded, [*pair[0].examples, *pair[1].examples, *guard], deltas)
    parts = (together[:first], together[first : first + second], together[first + second :])
    return {key: _kept(part) for key, part in zip((*(member.name for member in pair), GUARD), parts, strict=True)}


def losses(pair: tuple[Member, Member], together: Mapping[str, Any], alone: Mapping[Key, Any]) -> dict[str, Any]:
    """Each member's loss in nats per token: measured, and as a probe on the first k examples sees it."""
    row: dict[str, Any] = {"measured": {}, "probe": {str(k): {} for k in PROBED}}
    for member in pair:
        before, after = alone[member.name,]["alone"], together[member.name]
        row["measured"][member.name] = _nll(after, slice(-MEASURED, None)) - _nll(before, slice(-MEASURED, None))
        for k in PROBED:
            row["probe"][str(k)][member.name] = _nll(after, slice(k)) - _nll(before, slice(k))
    worst_alone = max(_nll(alone[member.name,][GUARD]) for member in pair)
    return row | {"worse": max(row["measured"].values()), GUARD: _nll(together[GUARD]) - worst_alone}


def _nll(kept: Mapping[str, Any], part: slice = slice(None)) -> float:
    return ratio(kept["nats"][part], kept["tokens"][part])[0]


def weights_say(one: Member, other: Member) -> dict[str, Any]:
    """Every number of the conflict report for the complete model, the most decisive ones for each module, and norms."""
    both = [one.adapter, other.adapter]
    (pair,), compared = conflicts(both, [1.0, 1.0]).pairs, compare_all(both, weights_of([1.0, 1.0]))
    rows = [
        {"module": module, **norms_of(compared.modules[module]), "cosine": numbers.cosine}
        | {"input_ab": numbers.input_overlap_ab, "input_ba": numbers.input_overlap_ba}
        for module, numbers in pair.modules.items()
    ]
    return {"whole": {**asdict(pair.numbers), **norms_of(compared.total)}, "modules": rows}


def norms_of(sums: PairSums) -> dict[str, float]:
    return {"norm_a": sums.norm(0), "norm_b": sums.norm(1)}


def activations_say(loaded: LoadedModel, one: Member, other: Member) -> dict[str, Any]:
    """Victim -> how strongly the other adapter acts on examples of the victim's suite, completions included."""
    row: dict[str, Any] = {}
    for victim, intruder in ((one, other), (other, one)):
        examples = victim.examples[:WATCHED]
        interference = activation_interference(loaded, examples, victim.adapter.deltas, intruder.adapter.deltas)
        row[victim.name] = asdict(interference)
    return row


def _line(row: dict[str, Any]) -> str:
    """Rounds to five digits: more mean nothing, and the rows of all modules are kept beside the tables made of them."""
    short = json.loads(json.dumps(row), parse_float=lambda digits: float(f"{float(digits):.5g}"))
    return json.dumps(short) + "\n"


if __name__ == "__main__":
    main()
