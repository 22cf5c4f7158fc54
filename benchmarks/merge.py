"""Cost of merging three adapters into a checkpoint: the command, the library, PEFT, mergekit, and a copy as the floor.

Every case is a fresh process that writes a complete checkpoint and starts with no dirty pages in the page cache. The
floor is `cp` and an fsync of every file: a checkpoint that must survive a power cut cannot cost less. PEFT's and
mergekit's output is neither synced nor verified, so their figures flatter them a little.

Two checkpoints: `--base`, and one of 1.1 billion parameters made for the run, with adapters of rank 16 on every linear
module; the command alone also merges one of twice the layers, for its memory. mergekit runs where an environment for it
is named (`--mergekit-venv`, created if missing). It takes a LoRA as `model+lora`, first merges each into its own
checkpoint on disk, and then adds up the differences: that is the cost of the same result with it.

With `--device cuda` our merge and PEFT's compute on a GPU, and a copy of the same bytes to the GPU and back is one more
floor.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import harness
from benchmarks.harness import Case, Rounds, Sample

SQL, TERRAFORM, SUPPORT = (
    Path(f"examples/adapters/{name}") for name in ("sql-migration", "terraform-review", "support-macros")
)
ADAPTERS = (SQL, TERRAFORM, SUPPORT)
FLOOR, OURS, LIBRARY = "cp + fsync", "adaptory merge", "composer: plan and run"
PEFT, MERGEKIT = "PEFT: one after the other", "mergekit: task_arithmetic"
LAYERS, RANK, BIG_ROUNDS = 22, 16, 3


def main() -> None:
    chosen = harness.options(__doc__, rounds=7)
    harness.announce("merge", "torch", "peft", "transformers")
    mergekit = mergekit_environment(chosen.mergekit_venv) if chosen.mergekit_venv else None
    with TemporaryDirectory(dir=chosen.base.parent, prefix="bench-merge-") as name:
        directory = Path(name)
        small = chosen.base.resolve(strict=True)
        cases = _cases(small, directory / "out", ADAPTERS, chosen.device)
        # PEFT's `cat` fails on the three: it takes the first one's layers for all, and one adapter has other layers.
        cases["PEFT: cat of two, merge"] = once("peft_cat", small, directory / "out", (SQL, SUPPORT), chosen.device)
        _report("Three adapters into the base", small, harness.interleave(cases, chosen.rounds))
        layers, rounds = (2, 1) if chosen.quick else (LAYERS, min(chosen.rounds, BIG_ROUNDS))
        _large(directory, layers, rounds, mergekit, chosen.device)


def mergekit_environment(directory: Path) -> Path:
    """The mergekit command; prints its version."""
    python = directory / "bin" / "python"
    if not python.with_name("mergekit-yaml").exists():
        subprocess.run([sys.executable, "-m", "venv", directory], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "mergekit"], check=True)
    ask = "from importlib.metadata import version as v; print('mergekit', v('mergekit'), 'with torch', v('torch'))"
    print(subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.strip())
    return python.with_name("mergekit-yaml")


def _large(directory: Path, layers: int, rounds: int, mergekit: Path | None, device: str) -> None:
    base, *adapters = _made(directory / "large", layers)
    out = directory / "out"
    cases = _cases(base, out, adapters, device)
    if mergekit:
        cases[MERGEKIT] = _mergekit(mergekit, base, out, adapters)
    cases[f"{OURS}, one adapter"] = _ours(base, out, adapters[:1], device)
    _report(f"Three adapters of rank {RANK} on all linear modules", base, harness.interleave(cases, rounds))
    twice, *larger = _made(directory / "twice", 2 * layers)
    doubled = {FLOOR: floor(twice, out), OURS: _ours(twice, out, larger, device)}
    _report("The same, twice the layers", twice, harness.interleave(doubled, rounds))


def _made(directory: Path, layers: int) -> list[Path]:
    """A base and three adapters."""
    subprocess.run([sys.executable, "-m", "benchmarks.models", directory, str(layers), str(RANK)], check=True)
    return [directory / name for name in ("base", "one", "two", "three")]


def _report(title: str, base: Path, results: Rounds) -> None:
    size = sum(file.stat().st_size for file in base.iterdir())
    print(f"\n{size / harness.MB:.0f} MB in {len(list(base.glob('*.safetensors')))} shards, in the page cache;")
    print(f"load average {os.getloadavg()[0]:.1f}")
    harness.report(f"{title}, whole process", results, FLOOR)
    own = {name: [sample.inside_s for sample in samples] for name, samples in results.items()}
    inside = {name: [Sample(seconds) for seconds in times if seconds] for name, times in own.items() if all(times)}
    if inside:
        floor = [replace(sample, peak_rss_bytes=None) for sample in results[FLOOR]]
        harness.report("The same, without the time of imports", {FLOOR: floor, **inside}, FLOOR)
        speeds = [
            [name, harness.spread([size / harness.MB / sample.seconds for sample in samples])]
            for name, samples in ({FLOOR: floor} | inside).items()
        ]
        harness.table("Weights a second, without imports", [["case", "MB/s (min..max)"], *speeds])


def _cases(base: Path, out: Path, adapters: Sequence[Path], device: str) -> dict[str, Case]:
    on_device = {} if device == "cpu" else {"to the device and back": once("device_copy", base, out, (), device)}
    return {
        FLOOR: floor(base, out),
        **on_device,
        OURS: _ours(base, out, adapters, device),
        LIBRARY: once("composer", base, out, adapters, device),
        "composer: imports alone": once("imports", base, out, (), device),
        PEFT: once("peft_in_turn", base, out, adapters, device),
    }


def floor(base: Path, out: Path) -> Case:
    copy = ["sh", "-c", 'cp -r "$1" "$2" && sync "$2"/* "$2"', "sh", base, out]
    return _fresh(out, lambda: harness.process(copy))


def _ours(base: Path, out: Path, adapters: Sequence[Path], device: str) -> Case:
    command = [harness.ADAPTORY, "merge", "--base", base, "-o", out, "--device", device]
    command += [word for adapter in adapters for word in ("--adapter", adapter)]
    return _fresh(out, lambda: harness.process(command))


def once(how: str, base: Path, out: Path, adapters: Sequence[Path] = (), device: str = "cpu") -> Case:
    command = [sys.executable, "-m", "benchmarks.merge_once", how, device, base, out, *adapters]
    return _fresh(out, lambda: harness.process(command, prints_seconds=True))


def _mergekit(command: Path, base: Path, out: Path, adapters: Sequence[Path]) -> Case:
    recipe, cache = out.with_name("mergekit.json"), out.with_name("mergekit-cache")
    models = [{"model": f"{base}+{adapter}", "parameters": {"weight": 1.0}} for adapter in adapters]
    wanted = {"merge_method": "task_arithmetic", "base_model": str(base), "models": models, "dtype": "bfloat16"}
    recipe.write_text(json.dumps(wanted))  # YAML too
    words = [command, recipe, out, "--lora-merge-cache", cache, "--no-copy-tokenizer", "--quiet"]

    def run() -> Sample:
        try:
            return harness.process(words)
        finally:
            shutil.rmtree(cache, ignore_errors=True)

    return _fresh(out, run)


def _fresh(out: Path, run: Callable[[], Sample]) -> Case:
    def case() -> Sample:
        shutil.rmtree(out, ignore_errors=True)
        os.sync()
        return run()

    return case


if __name__ == "__main__":
    main()
