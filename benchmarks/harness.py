"""Interleaved rounds: every case once per round, a ratio to the floor within each round, median and spread over rounds.

Machines drift and neighbours come and go, so a ratio of two medians misleads; a ratio of two runs a second apart does
not.
"""

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median

ADAPTORY = Path(sys.executable).with_name("adaptory")
"""The command installed in this interpreter's environment."""
MB = 1e6
_PER_SECOND = {"s": 1.0, "ms": 1e3}
_COMPILED = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
"""The environment without PYTHONDONTWRITEBYTECODE: the warm-up round compiles modules, as an installed package's
are.
"""


@dataclass(frozen=True, slots=True)
class Sample:
    """One case in one round. `inside_s` is the time that a process measured itself, without its imports. `calls` has
    the seconds of each call, where `seconds` is their median."""

    seconds: float
    peak_rss_bytes: int | None = None
    inside_s: float | None = None
    calls: tuple[float, ...] = ()


Case = Callable[[], Sample]
Rounds = Mapping[str, Sequence[Sample]]


def options(description: str | None, rounds: int) -> argparse.Namespace:
    """Parses the options, which are the same everywhere, so that one command runs every benchmark."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--base", type=Path, default=Path(".demo/base"), help="what examples/make_base.py wrote")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--postgres", help="URL of a server that allows creating databases, for claims about both")
    parser.add_argument("--device", default="cpu", help="where merges compute: cpu or cuda:N")
    parser.add_argument("--mergekit-venv", type=Path, help="a virtual environment with mergekit, to measure it too")
    parser.add_argument(
        "--tool", help="one of those compared alone, each recipe once: for what it keeps, not for times"
    )
    parser.add_argument("--adapters", type=Path, help="where examples/train.py put the study's, to measure their sets")
    parser.add_argument("--quick", action="store_true", help="two rounds and small sizes: checks only that it runs")
    chosen = parser.parse_args()
    if not (chosen.base / "config.json").is_file():
        parser.error(f"there is no base in {chosen.base}: run `make demo`, or name one with --base")
    if chosen.quick:
        chosen.rounds = 2
    return chosen


def announce(module: str, *packages: str) -> None:
    """Prints the head of every result: what was run, when, and on what kind of machine."""
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"## {' '.join(['python -m', f'benchmarks.{module}', *sys.argv[1:]])}\n")
    print(f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {os.cpu_count()} cores, load average {load}")
    print(f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, {versions}", flush=True)


def interleave(cases: Mapping[str, Case], rounds: int) -> dict[str, list[Sample]]:
    """Runs every case once per round, after a warm-up round whose results are dropped. Each round starts with another
    case, so that none always comes first."""
    names = list(cases)
    results: dict[str, list[Sample]] = {name: [] for name in names}
    for number in range(rounds + 1):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            sample = cases[name]()
            if number:
                results[name].append(sample)
        if sys.stderr.isatty():
            print(f"\rround {number} of {rounds}", end="" if number < rounds else "\n", file=sys.stderr)
    return results


def process(command: Sequence[str | Path], *, prints_seconds: bool = False) -> Sample:
    """Runs a command from start to exit, with the peak memory of it and of the children it waited for.

    With `prints_seconds` the last word of its output is `inside_s`. The kernel counts the memory of the forking process
    too, up to exec: measure from a small process. Raises RuntimeError with the end of the output when the command
    fails.
    """
    started = time.perf_counter()
    child = subprocess.Popen(
        [str(word) for word in command], env=_COMPILED, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert child.stdout is not None
    output = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - started
    child.stdout.close()
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"{command[0]} ended with {child.returncode}:\n{output[-2000:]}")
    return Sample(seconds, usage.ru_maxrss * 1024, float(output.split()[-1]) if prints_seconds else None)


def calls(call: Callable[[], object], count: int) -> Sample:
    """`count` calls in a row: their median, and each one."""
    times: list[float] = []
    for _ in range(count):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return Sample(median(times), calls=tuple(times))


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def report(title: str, results: Rounds, floor: str, unit: str = "s") -> None:
    """Prints a table: time, its ratio to `floor` in the same round, and p95 and peak memory where they were taken."""
    scale = _PER_SECOND[unit]
    timed = any(sample.calls for samples in results.values() for sample in samples)
    weighed = any(sample.peak_rss_bytes for samples in results.values() for sample in samples)
    heading = ["case", f"{unit} (min..max)", f"times {floor}"] + [f"p95 {unit}"] * timed + ["peak RSS, MB"] * weighed
    rows = [heading]
    for name, samples in results.items():
        ratios = [one.seconds / other.seconds for one, other in zip(samples, results[floor], strict=True)]
        row = [name, spread([sample.seconds * scale for sample in samples]), spread(ratios)]
        if timed:
            row.append(figure(percentile([each for sample in samples for each in sample.calls], 0.95) * scale))
        if weighed:
            row.append(spread([(sample.peak_rss_bytes or 0) / MB for sample in samples]))
        rows.append(row)
    table(f"{title} ({len(results[floor])} rounds)", rows)


def table(title: str, rows: Sequence[Sequence[str]]) -> None:
    """Markdown, padded to be read in a terminal too; the first row is the heading."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    print(f"\n### {title}\n")
    for number, row in enumerate(rows):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
        if number == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")
    sys.stdout.flush()


def memory(before: float, after: float, highest: float) -> None:
    """Prints the resident memory of a server in bytes: before and after the measurements, and its highest."""
    row = [figure(value / MB) for value in (before, after, highest)]
    table("Resident memory of the API process, MB", [["before", "after", "highest"], row])


def spread(values: Sequence[float]) -> str:
    """Median and range."""
    return f"{figure(median(values))} ({figure(min(values))}..{figure(max(values))})"


def figure(value: float) -> str:
    """Three digits; more would be noise."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
