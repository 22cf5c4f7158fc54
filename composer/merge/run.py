"""Merges adapters into a checkpoint: `plan_merge` decides (plan.py), `run_merge` writes and verifies (shards.py)."""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from composer.checks.check import flushed_to_zero, unchanged_result
from composer.deltas.tensors import torch_device
from composer.findings import Finding, refuse_errors
from composer.formats.checkpoints.card import CARD_FILE, made_card
from composer.formats.checkpoints.checkpoint import INDEX_FILE
from composer.formats.checkpoints.hashing import architecture_digest, refuse_changed
from composer.formats.checkpoints.staging import NOTE_FILE, staged_directory, write_json
from composer.formats.recipes.methods import parse_settings
from composer.merge.chunks import Rewriter
from composer.merge.io.journal import ShardJournal
from composer.merge.plan import MergePlan
from composer.merge.proof import Proof, ProofPrompt, prove, record_proof
from composer.merge.rounding_loss import RoundingLoss, find_lost, total
from composer.merge.shards import Written, write_shards
from composer.methods.retention import Retention
from composer.methods.spectral import Compression, total_loss

_SPARE_BYTES = 8 << 20  # index, notes and the file system's own


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeReport:
    """The result of a merge. Bytes were copied by the kernel and compared, or rewritten through float32.
    `resumed_bytes` of both come from an earlier, interrupted run and were verified again.

    `survival` is the share of all deltas together that survived rounding to the output's dtype; `findings` name those
    too small for it. `compressions` have each module's loss where the method cuts to a rank: rounding comes after that.
    `proof` compares the result's answers, if prompts were given.
    """

    out_dir: str
    touched_tensors: int
    shards: int
    copied_bytes: int
    rewritten_bytes: int
    resumed_bytes: int
    verified_rows: int
    seconds: float
    device: str
    survival: RoundingLoss
    findings: tuple[Finding, ...]
    retention: Retention
    compressions: tuple[Compression, ...] = ()
    proof: Proof | None = None

    @property
    def lost(self) -> float:
        """|Δ - Δ'| / |Δ| over all modules that were cut to a rank; 0 if none was."""
        return total_loss(self.compressions)

    def to_json(self) -> dict[str, Any]:
        rows = [asdict(compression) | {"relative": compression.relative} for compression in self.compressions]
        reports = {"survival": self.survival.to_json(), "findings": [finding.to_json() for finding in self.findings]}
        reports["retention"] = self.retention.to_json()
        reports["proof"] = self.proof.to_json() if self.proof else None
        return {**asdict(self), **reports, "lost": self.lost, "compressions": rows}


def run_merge(
    plan: MergePlan,
    out_dir: Path,
    device: str = "auto",
    progress: Callable[[int], None] | None = None,
    note: Mapping[str, Any] | None = None,
    prompts: Sequence[ProofPrompt] = (),
) -> MergeReport:
    """Writes the merged checkpoint to `out_dir`: staged, verified, renamed. Memory holds a few chunks per thread and
    the factors of a few tensors, whatever the model's size.

    A killed or interrupted merge resumes when run again with the same inputs: finished shards are kept and verified
    again. `device` is `auto` (CUDA if available), `cpu` or `cuda:N`. `progress` is called from several threads with the
    bytes just done, `plan.size_bytes` in total, and may raise Interrupted. `note` (a recipe, a lock) goes into
    adaptory.json. With `prompts` the result must prove itself before the output appears; see proof.py.

    Raises Mismatch for a warning about the result if the plan is strict; RefusedOutput for a directory that exists or
    is being written, a full disk, inputs modified meanwhile, a value too large for the output dtype, or a result that
    fails verification or its proof.
    """
    started = time.monotonic()
    chosen = torch_device(device)
    with staged_directory(out_dir, plan.size_bytes + _SPARE_BYTES, plan.key) as staging:
        journal = ShardJournal(staging)
        written = write_shards(plan.shards, journal, Rewriter(chosen, plan.rounding), progress)
        refuse_changed(plan.inputs)
        refuse_errors("This is not merged", findings_of(plan, written), strict=plan.strict)
        # Last, since shards have their full size from the start: without these, nothing loads an incomplete merge.
        write_texts(plan, staging, note, written.survivals)
        proof = prove(plan, staging, prompts, device) if prompts else None
        if proof:
            proof.refuse_failed()
            record_proof(staging, proof)
        journal.close()
    return replace(report_of(plan, written, str(out_dir), time.monotonic() - started, chosen), proof=proof)


def write_texts(
    plan: MergePlan, directory: Path, note: Mapping[str, Any] | None, survivals: Mapping[str, RoundingLoss]
) -> None:
    """Writes all files of the output but the weights."""
    for name, file in plan.side_files.files.items():
        shutil.copyfile(file, directory / name)
    write_json(directory / "config.json", plan.config)
    if plan.checkpoint.index is not None:
        write_json(directory / INDEX_FILE, index_of(plan))
    names = [use.name for use in plan.adapters]
    card = made_card("Model", names, plan.method, plan.retention().words, note or {})
    (directory / CARD_FILE).write_text(card, encoding="utf-8")
    write_json(directory / NOTE_FILE, _note(plan, note, survivals))


def report_of(plan: MergePlan, written: Written, out_dir: str, seconds: float, device: torch.device) -> MergeReport:
    """The report of a plan that was written."""
    return MergeReport(
        out_dir=out_dir,
        touched_tensors=len(plan.touched),
        shards=len(plan.shards),
        copied_bytes=written.copied_bytes,
        rewritten_bytes=written.rewritten_bytes,
        resumed_bytes=written.resumed_bytes,
        verified_rows=written.verified_rows,
        seconds=seconds,
        device=str(device),
        survival=total(written.survivals.values()),
        findings=tuple(findings_of(plan, written)),
        retention=plan.retention(),
        compressions=plan.compressions,
    )


def findings_of(plan: MergePlan, written: Written) -> list[Finding]:
    """The findings on what was written: deltas that rounding loses, values that float16 makes zero, and a result that
    equals the base."""
    dtypes = {tensor.target.name: tensor.target.dtype for shard in plan.shards for tensor in shard.tensors}
    lost = [*find_lost(written.survivals, dtypes, plan.rounding), *flushed_to_zero(written.measured.flushed)]
    known = any(finding.code == "zero_result" for finding in plan.findings)
    if plan.touched and not written.measured.changed and not known:
        lost.append(unchanged_result(plan.method, len(plan.touched)))
    return [*lost, *plan.retention().findings(plan.method, total_loss(plan.compressions))]


def index_of(plan: MergePlan) -> dict[str, Any]:
    """The output's index file."""
    weight_map = {tensor.target.name: shard.file for shard in plan.shards for tensor in shard.tensors}
    total = sum(tensor.target.size_bytes for shard in plan.shards for tensor in shard.tensors)
    old: Mapping[str, Any] = plan.checkpoint.index or {}
    return {
        "metadata": {**(old.get("metadata") or {}), "total_size": total},
        "weight_map": dict(sorted(weight_map.items())),
    }


def _note(plan: MergePlan, note: Mapping[str, Any] | None, survivals: Mapping[str, RoundingLoss]) -> dict[str, Any]:
    changed = {name: survival.to_json() for name, survival in survivals.items() if survival.entries}
    architecture = plan.checkpoint.architecture
    return {
        "made": "merge",
        "base": {"model_type": architecture.model_type, "architecture_digest": architecture_digest(architecture)},
        "adapters": [adapter.to_json() for adapter in plan.adapters],
        "tokenizer": plan.side_files.to_json(),
        "method": plan.method,
        "method_version": parse_settings(plan.method, plan.settings).version,
        "settings": dict(plan.settings),
        "dtype": plan.dtype,
        "rounding": asdict(plan.rounding),
        "retention": plan.retention().to_json(),
        "survival": {"whole": total(survivals.values()).to_json(), "tensors": changed},
        "note": dict(note or {}),
    }
