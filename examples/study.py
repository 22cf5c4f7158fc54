"""What predicts that two adapters hurt each other: every pair of a dozen small adapters, merged and measured.

    python examples/train.py study --base BASE --out ADAPTERS
    python examples/study.py --base BASE --adapters ADAPTERS --out MINE.jsonl

Writes one line of JSON a pair to `--out`, and goes on where an earlier run stopped. `study_report.py` makes the tables
of docs/study.md from it. The examples that a probe sees are held apart from those that the damage is measured on.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from tasks import STUDY_TASKS, TASKS, Task
from train import ADAPTERS, STUDY

from composer.conflicts import conflicts
from composer.conflicts.interference import activation_interference
from composer.delta import Delta
from composer.evaluate import Encoded, encode, measure, ratio
from composer.methods import combine_deltas
from composer.model import LoadedModel, load_model
from composer.suite import Example, Suite
from composer.variants import LoadedAdapter, load_deltas

OLDER = {"sql-migration": "sql", "terraform-review": "terraform", "support-macros": "support"}
METHODS: dict[str, tuple[str, float]] = {"sum": ("stack", 1.0), "mean": ("stack", 0.5), "ties": ("ties", 1.0)}
PROBED = (1, 2, 4)
MEASURED = 8
GUARDED = 8


@dataclass(frozen=True)
class Member:
    """An adapter, the examples its probe sees, and those that its loss is measured on."""

    adapter: LoadedAdapter
    probe: list[Encoded]
    measured: list[Encoded]

    @property
    def name(self) -> str:
        return self.adapter.name

    @property
    def examples(self) -> list[Encoded]:
        return [*self.probe, *self.measured]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="the directory make_base.py wrote")
    parser.add_argument("--adapters", type=Path, required=True, help="where train.py put the study's adapters")
    parser.add_argument("--out", type=Path, required=True, help="a file of rows, which is gone on with if it is there")
    chosen = parser.parse_args()
    for directory in (chosen.base, *(chosen.adapters / name for name in STUDY)):
        if not directory.is_dir():
            parser.error(f"{directory} is not there: make_base.py and train.py write the base and the adapters.")
    loaded = load_model(chosen.base, "cpu")
    members = list(_members(loaded, chosen.adapters))
    done = _done(chosen.out)
    alone = {member.name: nats(loaded, member.examples, member.adapter.deltas) for member in members}
    base = {member.name: nats(loaded, member.examples, ()) for member in members}
    guard = [encode(loaded, example, chat=True) for example in _suite(TASKS["guard"]).sample(GUARDED)]
    guards = {member.name: nats(loaded, guard, member.adapter.deltas) for member in members}
    with chosen.out.open("a") as out:
        for one, other in combinations(members, 2):
            if (one.name, other.name) in done:
                continue
            row = {"a": one.name, "b": other.name, "weights": weights_say(one, other)}
            row["activations"] = activations_say(loaded, one, other)
            row["losses"] = {method: losses(loaded, (one, other), method, alone, (guard, guards)) for method in METHODS}
            row["alone"] = {member.name: summed(alone[member.name]) for member in (one, other)}
            row["base"] = {member.name: summed(base[member.name]) for member in (one, other)}
            out.write(_line(row))
            out.flush()
            print(one.name, other.name, {m: round(row["losses"][m]["worse"], 3) for m in METHODS}, flush=True)


def _members(loaded: LoadedModel, directory: Path) -> Iterable[Member]:
    tasks = {name: (ADAPTERS / name, TASKS[task]) for name, task in OLDER.items()}
    tasks |= {name: (directory / name, STUDY_TASKS[name]) for name in STUDY}
    for path, task in tasks.values():
        encoded = [encode(loaded, example, chat=True) for example in _suite(task).sample(max(PROBED) + MEASURED)]
        adapter = load_deltas(path, loaded.architecture)
        yield Member(adapter, encoded[: max(PROBED)], encoded[max(PROBED) :])


def _suite(task: Task) -> Suite:
    _, held_out = task.split()
    examples = tuple(Example(prompt, completion) for prompt, completion in held_out)
    kind: Any = task.kind
    return Suite(task.suite, kind, task.description, True, examples)


def _done(path: Path) -> set[tuple[str, str]]:
    lines = path.read_text().splitlines() if path.exists() else []
    return {(row["a"], row["b"]) for row in map(json.loads, lines)}


def nats(loaded: LoadedModel, examples: Sequence[Encoded], deltas: Iterable[Delta]) -> list[tuple[float, int]]:
    """(nats, tokens) of each example."""
    return [(one.nats, one.tokens) for one in measure(loaded, examples, deltas)]


def summed(measured: Sequence[tuple[float, int]]) -> float:
    """Nats per completion token over the measured examples."""
    return _mean(measured[max(PROBED) :])


def losses(
    loaded: LoadedModel,
    pair: tuple[Member, Member],
    method: str,
    alone: dict[str, list[tuple[float, int]]],
    guard: tuple[list[Encoded], dict[str, list[tuple[float, int]]]],
) -> dict[str, Any]:
    """What each member loses, in nats per token: measured, and as a probe on the first k examples sees it."""
    name, weight = METHODS[method]
    deltas = combine_deltas([member.adapter for member in pair], [weight] * 2, name).deltas
    examples, alone_on_guard = guard
    together = nats(loaded, [*pair[0].examples, *pair[1].examples, *examples], deltas)
    cut = len(pair[0].examples)
    found = {member.name: part for member, part in zip(pair, (together[:cut], together[cut : 2 * cut]), strict=True)}
    told: dict[str, Any] = {"measured": {}, "probe": {str(k): {} for k in PROBED}}
    for member in pair:
        before, after = alone[member.name], found[member.name]
        told["measured"][member.name] = summed(after) - summed(before)
        for k in PROBED:
            told["probe"][str(k)][member.name] = _mean(after[:k]) - _mean(before[:k])
    worst_alone = max(_mean(alone_on_guard[member.name]) for member in pair)
    return told | {"worse": max(told["measured"].values()), "guard": _mean(together[2 * cut :]) - worst_alone}


def weights_say(one: Member, other: Member) -> dict[str, Any]:
    """Every number of the conflict report, for the whole model, and for each module what decides most."""
    (pair,) = conflicts([one.adapter, other.adapter], [1.0, 1.0]).pairs
    rows = [
        {"module": module, **{key: getattr(numbers, key) for key in ("norm_a", "norm_b", "cosine")}}
        | {"input_ab": numbers.input_overlap_ab, "input_ba": numbers.input_overlap_ba}
        for module, numbers in pair.modules.items()
    ]
    return {"whole": asdict(pair.numbers), "modules": rows}


def activations_say(loaded: LoadedModel, one: Member, other: Member) -> dict[str, Any]:
    """Directed, on the prompts that the victim's probe uses: victim -> how strongly the other acts there."""
    told: dict[str, Any] = {}
    for victim, intruder in ((one, other), (other, one)):
        found = activation_interference(loaded, victim.probe, victim.adapter.deltas, intruder.adapter.deltas)
        told[victim.name] = asdict(found)
    return told


def _line(row: dict[str, Any]) -> str:
    """To five digits: more say nothing, and the rows of all modules are kept beside the tables made of them."""
    short = json.loads(json.dumps(row), parse_float=lambda digits: float(f"{float(digits):.5g}"))
    return json.dumps(short) + "\n"


def _mean(measured: Sequence[tuple[float, int]]) -> float:
    return ratio([nats for nats, _ in measured], [tokens for _, tokens in measured])[0]


if __name__ == "__main__":
    main()
