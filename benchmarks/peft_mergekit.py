"""Adaptory, PEFT and mergekit at equal recipes: the time and memory of a merged checkpoint, and what it keeps.

Each recipe is run by each tool as a fresh process, on a pair and on three of the repository's adapters, and with
`--adapters` on all eight sets of docs/methods/study.md that a search was measured on. Kept is the
share of the worst member's gain over the base that is left on 16 examples of its suite, and below it how many of the
answers that it gives alone. Equal recipes should keep equally much; the last row is what only one of the tools has,
`regmean`, fitted on four other examples of each member.

PEFT's mean sets each adapter's scale: its `cat` and `linear` need adapters of the same layers or the same rank. Its
`ties` works on the factors A and B, the others' on the products. mergekit runs where an environment for it is named
(`--mergekit-venv`, created if missing) and merges each adapter into a checkpoint of its own first.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import harness
from benchmarks.harness import Case, Sample
from benchmarks.merge import mergekit_environment

SETS = (("sql-migration-1.1", "terraform-review"), ("sql-migration-1.1", "terraform-review", "support-macros"))
OURS, PEFT, MERGEKIT = "adaptory", "PEFT", "mergekit"
DENSITY = 0.5


def main() -> None:
    chosen = harness.options(__doc__, rounds=3)
    harness.announce("peft_mergekit", "torch", "peft", "transformers")
    mergekit = mergekit_environment(chosen.mergekit_venv) if chosen.mergekit_venv else None
    wanted = (
        []
        if chosen.adapters and not chosen.quick
        else ["+".join(names) for names in SETS[: 1 if chosen.quick else None]]
    )
    with TemporaryDirectory(dir=chosen.base.parent, prefix="bench-peft-mergekit-") as name:
        for number, members in enumerate(_sets(chosen.adapters or Path(), wanted)):
            directory = Path(name) / str(number)
            directory.mkdir()
            suites = {Path(path): _written(suite, directory) for path, suite in members}
            base = chosen.base.resolve(strict=True)
            _compare(base, suites, directory, mergekit, 0 if chosen.tool else chosen.rounds, chosen.tool)


def _sets(adapters: Path, wanted: Sequence[str]) -> list[list[tuple[str, dict[str, Any]]]]:
    command = [sys.executable, "-m", "benchmarks.kept_sets", adapters, *wanted]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _written(suite: Mapping[str, Any], directory: Path) -> Path:
    path = directory / f"{suite['name']}.yaml"
    path.write_text(json.dumps(suite))  # YAML too
    return path


def _compare(
    base: Path, suites: Mapping[Path, Path], directory: Path, mergekit: Path | None, rounds: int, tool: str | None
) -> None:
    """`suites` has the file of each adapter's suite. Without rounds, each command of the tool runs once."""
    outs = {name: directory / name.replace(" ", "-").replace(":", "") for name in _names(mergekit)}
    commands = _commands(base, suites, outs, mergekit)
    failed: dict[str, str] = {}
    wanted = {name: command for name, command in commands.items() if tool is None or name.endswith(f": {tool}")}
    cases = {name: _case(name, command, outs[name], failed) for name, command in wanted.items()}
    print(f"\nload average {os.getloadavg()[0]:.1f}")
    results = harness.interleave(cases, rounds) if rounds else {name: [case()] for name, case in cases.items()}
    made = [name for name in results if name not in failed]
    kept = dict(zip(made, _kept(base, suites, [outs[name] for name in made]), strict=True))
    rows = [["recipe and tool", "s (min..max)", "peak RSS, MB", "worst member kept", "answers left"]]
    for name, samples in results.items():
        if name in failed:
            rows.append([name, "fails", "", failed[name], ""])
            continue
        seconds = harness.spread([sample.seconds for sample in samples])
        memory = harness.figure(max(sample.peak_rss_bytes or 0 for sample in samples) / harness.MB)
        answers = ", ".join(f"{left} of {alone}" for left, alone in kept[name]["exact"])
        rows.append([name, seconds, memory, f"{min(kept[name]['kept']):.3f}", answers])
    harness.table(f"{' + '.join(path.name for path in suites)} ({rounds or 1} rounds)", rows)


def _names(mergekit: Path | None) -> list[str]:
    tools = [OURS, PEFT, *([MERGEKIT] if mergekit else [])]
    return [*(f"{recipe}: {tool}" for recipe in ("sum", "mean", "ties") for tool in tools), f"regmean: {OURS}"]


def _commands(
    base: Path, suites: Mapping[Path, Path], outs: dict[str, Path], mergekit: Path | None
) -> dict[str, list[str | Path]]:
    adapters, share = list(suites), 1 / len(suites)
    of_suites = [word for suite in suites.values() for word in ("--suite", str(suite))]
    recipes: dict[str, tuple[list[str], float, str]] = {
        "sum": (["--method", "stack"], 1.0, "task_arithmetic"),
        "mean": (["--method", "stack"], share, "task_arithmetic"),
        "ties": (["--method", "ties", "--set", f"density={DENSITY}"], 1.0, "ties"),
    }
    commands: dict[str, list[str | Path]] = {}

    def ours(name: str, words: Sequence[str], weight: float) -> None:
        given = [word for adapter in adapters for word in ("--adapter", f"{adapter}={weight}")]
        commands[name] = [harness.ADAPTORY, "merge", "--base", base, *given, *words, "-o", outs[name]]

    for recipe, (words, weight, theirs) in recipes.items():
        ours(f"{recipe}: {OURS}", words, weight)
        out = outs[f"{recipe}: {PEFT}"]
        how = {"sum": "peft_in_turn", "mean": "peft_mean", "ties": "peft_ties"}[recipe]
        commands[f"{recipe}: {PEFT}"] = [
            sys.executable,
            "-m",
            "benchmarks.merge_once",
            how,
            "cpu",
            base,
            out,
            *adapters,
        ]
        if mergekit:
            name = f"{recipe}: {MERGEKIT}"
            commands[name] = _mergekit(mergekit, base, outs[name], adapters, theirs, weight)
    ours(f"regmean: {OURS}", ["--method", "regmean", *of_suites], 1.0)
    return commands


def _mergekit(
    command: Path, base: Path, out: Path, adapters: Sequence[Path], method: str, weight: float
) -> list[str | Path]:
    parameters: dict[str, float] = {"weight": weight} | ({"density": DENSITY} if method == "ties" else {})
    recipe = out.with_suffix(".json")
    wanted: dict[str, Any] = {
        "merge_method": method,
        "base_model": str(base),
        "models": [{"model": f"{base}+{adapter}", "parameters": parameters} for adapter in adapters],
        "parameters": {"normalize": False},
        "dtype": "bfloat16",
    }
    recipe.write_text(json.dumps(wanted))  # YAML too
    return [command, recipe, out, "--lora-merge-cache", f"{out}-cache", "--quiet"]


def _case(name: str, command: Sequence[str | Path], out: Path, failed: dict[str, str]) -> Case:
    def run() -> Sample:
        shutil.rmtree(out, ignore_errors=True)
        # mergekit's merged adapters, and our fitted one: a repeated merge would take it.
        for beside in ("cache", "adapter"):
            shutil.rmtree(f"{out}-{beside}", ignore_errors=True)
        os.sync()
        try:
            return harness.process(command)
        except RuntimeError as error:
            failed[name] = str(error).strip().splitlines()[-1][:100]
            return Sample(0.0)

    return run


def _kept(base: Path, suites: Mapping[Path, Path], outs: Sequence[Path]) -> list[dict[str, Any]]:
    """Measured in a process of its own: the memory of this one would count as its children's."""
    pairs = [f"{adapter}={suite}" for adapter, suite in suites.items()]
    command = [sys.executable, "-m", "benchmarks.kept_once", base, *pairs, "--", *outs]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


if __name__ == "__main__":
    main()
