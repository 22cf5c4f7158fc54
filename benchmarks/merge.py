"""Merging three adapters into the base: the command, the library, PEFT, and the floor of copying the same bytes.

Every case is a fresh process that writes a whole checkpoint, and starts with nothing dirty in the page cache. The
floor is `cp` and an fsync of every file: less cannot be done for a checkpoint that must survive a power cut. PEFT's
output is neither synced nor verified, so its figures flatter it a little.
"""

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import harness
from benchmarks.harness import Case, Sample

SQL, TERRAFORM, SUPPORT = (
    Path(f"examples/adapters/{name}") for name in ("sql-migration", "terraform-review", "support-macros")
)
ADAPTERS = (SQL, TERRAFORM, SUPPORT)
FLOOR = "cp + fsync"


def main() -> None:
    chosen = harness.options(__doc__, rounds=7)
    base = chosen.base.resolve(strict=True)
    harness.announce("merge", "torch", "peft", "transformers")
    size = sum(file.stat().st_size for file in base.iterdir())
    print(f"base: {size / harness.MB:.0f} MB in {len(list(base.glob('*.safetensors')))} shards, in the page cache")
    with TemporaryDirectory(dir=base.parent, prefix="bench-merge-") as directory:
        results = harness.interleave(_cases(base, Path(directory) / "out"), chosen.rounds)
    harness.report("Three adapters into the base, whole process", results, FLOOR)
    own = {name: [sample.inside_s for sample in samples] for name, samples in results.items()}
    inside = {name: [Sample(seconds) for seconds in times if seconds] for name, times in own.items() if all(times)}
    floor = [replace(sample, peak_rss_bytes=None) for sample in results[FLOOR]]
    harness.report("The same, without the time of imports", {FLOOR: floor, **inside}, FLOOR)


def _cases(base: Path, out: Path) -> dict[str, Case]:
    def fresh(run: Callable[[], Sample]) -> Case:
        def case() -> Sample:
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            return run()

        return case

    def once(how: str, *adapters: Path) -> Case:
        command = [sys.executable, "-m", "benchmarks.merge_once", how, base, out, *adapters]
        return fresh(lambda: harness.process(command, tells_seconds=True))

    copy = ["sh", "-c", 'cp -r "$1" "$2" && sync "$2"/* "$2"', "sh", base, out]
    command = [harness.ADAPTORY, "merge", "--base", base, "-o", out]
    command += [word for adapter in ADAPTERS for word in ("--adapter", adapter)]
    return {
        FLOOR: fresh(lambda: harness.process(copy)),
        "adaptory merge": fresh(lambda: harness.process(command)),
        "composer: plan and run": once("composer", *ADAPTERS),
        "composer: imports alone": once("imports"),
        "PEFT: one after the other": once("peft_in_turn", *ADAPTERS),
        # Its `cat` gives up on the three: it takes the first one's layers for all, and one of them has other layers.
        "PEFT: cat of two, merge": once("peft_cat", SQL, SUPPORT),
    }


if __name__ == "__main__":
    main()
