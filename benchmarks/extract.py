"""A LoRA out of a fine-tuned checkpoint: `adaptory extract` and mergekit-extract-lora, at the same rank.

The checkpoint is a base of random weights with three adapters of rank 16 merged into its linear modules and rounded to
bfloat16, so that rank 48 holds all but the rounding. It is extracted at rank 16, and once more from twice the layers,
for the memory. The error is |Δ - BA| / |Δ| over all linear modules, computed here from the files that each wrote.

mergekit runs where an environment for it is named (`--mergekit-venv`, created if missing). It would decompose the
embeddings too, which are equal here: they are excluded, which saves it time.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks import harness
from benchmarks.harness import Case, Sample
from benchmarks.merge import mergekit_environment
from benchmarks.models import ADAPTERS
from composer.deltas.delta import LowRank
from composer.deltas.stored import stored_tensor
from composer.deltas.variants.load import load_deltas
from composer.formats.checkpoints.checkpoint import open_checkpoint

LAYERS, WIDTH, RANK = 4, 1024, 16
OURS, MERGEKIT = "adaptory extract", "mergekit-extract-lora"
_QUIET = ("--quiet", "--no-write-model-card")  # the card asks the hub for the base, and fails without a network


def main() -> None:
    chosen = harness.options(__doc__, rounds=3)
    harness.announce("extract", "torch")
    mergekit = mergekit_environment(chosen.mergekit_venv) if chosen.mergekit_venv else None
    with TemporaryDirectory(dir=chosen.base.parent, prefix="bench-extract-") as name:
        made: list[tuple[str, Path, Path, dict[str, Path]]] = []
        for title, layers in (("once", 1 if chosen.quick else LAYERS), ("twice", 2 if chosen.quick else 2 * LAYERS)):
            base, finetuned = _made(Path(name) / title, layers)
            outs = {OURS: base.with_name("ours")} | ({MERGEKIT: base.with_name("theirs")} if mergekit else {})
            cases = {tool: _case(_command(tool, base, finetuned, out, mergekit), out) for tool, out in outs.items()}
            print(f"\nload average {os.getloadavg()[0]:.1f}")
            results = harness.interleave(cases, chosen.rounds)
            harness.report(f"Rank {RANK} from {layers} layers of width {WIDTH}", results, OURS)
            made.append((title, base, finetuned, outs))
        rows = [["tool", "layers", "error"]]
        for title, base, finetuned, outs in made:
            rows += [[tool, title, f"{_error(base, finetuned, out):.5f}"] for tool, out in outs.items()]
        harness.table("|Δ - BA| / |Δ|", rows)


def _made(directory: Path, layers: int) -> tuple[Path, Path]:
    """A base, and a checkpoint fine-tuned from it."""
    words = [directory, str(layers), str(RANK), str(WIDTH)]
    subprocess.run([sys.executable, "-m", "benchmarks.models", *words], check=True)
    adapters = [word for name in ADAPTERS for word in ("--adapter", f"{directory / name}")]
    finetuned = directory / "finetuned"
    merge = [harness.ADAPTORY, "merge", "--base", directory / "base", *adapters, "-o", finetuned]
    subprocess.run(merge, check=True, stdout=subprocess.DEVNULL)
    return directory / "base", finetuned


def _command(tool: str, base: Path, finetuned: Path, out: Path, mergekit: Path | None) -> list[str | Path]:
    if tool == OURS or mergekit is None:
        given = ["--base", base, "--finetuned", finetuned, "--rank", str(RANK), "-o", out]
        return [harness.ADAPTORY, "extract", *given]
    given = ["--model", finetuned, "--base-model", base, "--out-path", out, "--max-rank", str(RANK)]
    return [mergekit.with_name("mergekit-extract-lora"), *given, "-e", "embed_tokens|lm_head|norm", *_QUIET]


def _case(command: Sequence[str | Path], out: Path) -> Case:
    def run() -> Sample:
        shutil.rmtree(out, ignore_errors=True)
        os.sync()
        return harness.process(command)

    return run


def _error(base: Path, finetuned: Path, adapter: Path) -> float:
    checkpoint, other = open_checkpoint(base), open_checkpoint(finetuned)
    missed = total = 0.0
    for delta in load_deltas(adapter, checkpoint.architecture).deltas:
        assert isinstance(delta, LowRank)
        W, changed = (stored_tensor(*side.locate(delta.weight)).float() for side in (checkpoint, other))
        made = delta.scale * (delta.B_OR.float() @ delta.A_RI.float())
        missed += float(torch.square(changed - W - made).sum())
        total += float(torch.square(changed - W).sum())
    return (missed / total) ** 0.5


if __name__ == "__main__":
    main()
