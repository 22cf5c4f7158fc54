"""Merges into the store, shard by shard, in units that need neither a database nor disk space for a checkpoint.

plan    lists the shards, from the base's headers and the adapters
shard   streams one shard from the base to a blob; reads every tensor of the base's file and returns their hashes
texts   writes the small files beside the weights, once all shards are stored
proof   loads the merged model as users do, and compares its answers

Together the hashes prove which base was merged, before anything is published. A quantized base is decoded from files on
one host, so a single unit merges it on disk.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any, TypedDict, cast

from composer.errors import Mismatch
from composer.formats.checkpoints.checkpoint import Checkpoint, local_directory
from composer.formats.checkpoints.files import StoredFile
from composer.formats.checkpoints.hashing import weights_digest
from composer.formats.recipes.rounding import parse_rounding
from composer.formats.recipes.suite import Suite
from composer.formats.recipes.weights import parse_weight
from registry.formats.manifest import ManifestFile
from registry.formats.references import Digest
from registry.transfer import uploads
from registry.transfer.bases import in_buckets
from registry.worker.combine_units import combined_adapter, member_rows
from registry.worker.composition import CompositionRun, ProgressCount
from registry.worker.engine.protocol import Needs
from registry.worker.engine.stores import UnitWriter
from registry.worker.engine.units import BaseHints, Count, Node, Task, Unit, always_intact
from registry.worker.node_files import (
    FilesRow,
    MemberRow,
    Row,
    are_stored,
    fetched,
    files_are_stored,
    from_rows,
    store_directory,
    to_rows,
)
from registry.worker.node_models import (
    PROCESS_BYTES,
    base_checkpoint,
    base_hints,
    everywhere,
    needs_of_model,
    opened_checkpoint,
)
from registry.worker.runner import JobRun

if TYPE_CHECKING:
    from composer.merge.plan import MergePlan
    from composer.merge.shards import ShardPlan, Written
    from composer.merge.stream import Origin, StreamedShard


class MergeContent(TypedDict):
    """The unit content that determines a merge's bytes."""

    base: str
    dtype: str | None
    rounding: dict[str, Any] | None
    method: str
    settings: Mapping[str, Any] | None
    members: list[MemberRow]


class PlannedShard(TypedDict):
    """A shard as the plan lists it."""

    file: str
    size_bytes: int
    rewritten_bytes: int
    layout: str


class ShardContent(MergeContent):
    """The unit content that determines a shard's bytes."""

    file: str
    layout: str


class PlanRow(TypedDict):
    """The result of planning; a merge is `decoded` if the base is quantized."""

    shards: list[PlannedShard]
    decoded: bool


class ShardRow(TypedDict):
    """A `StreamedShard` as JSON, with what the store copied by itself. It has more fields."""

    file: str
    size_bytes: int
    sha256: str
    tensor_hashes: dict[str, str]
    server_copied_bytes: int


class MergedRow(FilesRow):
    """Files in the store, and the report on them."""

    report: Row


class ProofRow(FilesRow):
    """The files that record a proof, and the proof."""

    proof: Row


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredModel:
    """A merged model whose files are blobs, and the merge's report."""

    files: Sequence[ManifestFile]
    report: Row


def merged_model(held: JobRun, work: CompositionRun) -> StoredModel:
    """Merges the model, running only the units without a kept result.

    Raises Mismatch if the units read anything but the locked base, and what the units raise.
    """
    started = monotonic()
    merge = merge_content(held, work)
    own = {**merge, "composition": work.composition_id}  # a location may have other headers and texts next time
    hints = base_hints(work.locations, work.base_bytes)
    needs = Needs(memory_bytes=PROCESS_BYTES, base=None if everywhere(hints) else work.lock.base)
    ((_, plan),) = held.engine.map(PLAN, [Unit(name="plan", content=own, hints=hints)], needs, held.check)
    count = ProgressCount(held, "bytes", sum(shard["size_bytes"] for shard in plan["shards"]))
    if plan["decoded"]:
        unit = Unit(name="merge", content={**own, "note": work.note}, hints=hints)
        ((_, made),) = held.engine.map(MERGE, [unit], needs, count)
        files = from_rows(made["files"])
        held.made.update(file.sha256 for file in files)
        return StoredModel(files=files, report=made["report"])
    units = [
        Unit(name=shard["file"], content={**merge, "file": shard["file"], "layout": shard["layout"]}, hints=hints)
        # The longest first: one begun last would leave the other nodes idle.
        for shard in sorted(plan["shards"], key=lambda shard: -shard["rewritten_bytes"])
    ]
    rows: dict[str, ShardRow] = {}
    for unit, row in held.engine.map(SHARD, units, needs, count):
        held.made.add(file_of(row).sha256)
        rows[unit.name] = row
        count.reached(sum(row["size_bytes"] for row in rows.values()))
    ordered = [rows[shard["file"]] for shard in plan["shards"]]
    try:
        refuse_other_base(work, ordered)
    except Mismatch:
        held.engine.forget(SHARD, units)  # made from another base, so unusable once this one is back
        raise
    shared = held.engine.node.share(json.dumps(ordered, sort_keys=True).encode())
    content = {**own, "shards": shared, "note": work.note}
    ((_, texts),) = held.engine.map(TEXTS, [Unit(name="texts", content=content, hints=hints)], needs, held.check)
    small = from_rows(texts["files"])
    held.made.update(file.sha256 for file in small)
    report = {**texts["report"], "seconds": monotonic() - started}
    return StoredModel(files=[*(file_of(row) for row in ordered), *small], report=report)


def refuse_other_base(work: CompositionRun, rows: Iterable[ShardRow]) -> None:
    """Raises Mismatch unless every byte that the shards read belongs to the locked base."""
    hashes = {name: digest for row in rows for name, digest in row["tensor_hashes"].items()}
    tensors = work.architecture.tensors.items()
    table = ((name, spec.dtype, spec.shape, hashes.get(name, "")) for name, spec in tensors)
    if weights_digest(table) != work.lock.base:
        locations = ", ".join(work.locations)
        raise Mismatch(
            "base_changed",
            f"The files at {locations} do not have the weights of the base {work.lock.base[:12]}.",
            subject=work.lock.base,
            next_step="Restore them, or register their current content as another base.",
        )


def file_of(row: ShardRow) -> ManifestFile:
    """Converts a shard's row to a file of a release."""
    return ManifestFile(row["file"], row["size_bytes"], Digest(row["sha256"]))


def merge_content(held: JobRun, work: CompositionRun) -> MergeContent:
    lock = work.lock
    rounding = asdict(lock.rounding) if lock.rounding else None
    if work.settings.pipeline.fitted:  # reuse the fitted factors: another fit would differ in the last bits
        members: list[MemberRow] = [{"name": "adapter", "weight": 1.0, "files": to_rows(combined_adapter(held, work))}]
        method, settings = "stack", None
    else:
        members, method, settings = member_rows(work), lock.method, lock.settings
    return {
        "base": lock.base,
        "dtype": lock.dtype,
        "rounding": rounding,
        "method": method,
        "settings": settings,
        "members": members,
    }


@dataclass(frozen=True, slots=True)
class _StoreSink:
    """A shard's `Sink` that writes to the store."""

    writer: UnitWriter

    def write(self, block: memoryview, origin: "Origin | None") -> None:
        source: StoredFile | None = origin.file if origin is not None else None
        self.writer.write(block, source, origin.offset if origin is not None else 0)

    def finish(self) -> str:
        return self.writer.finish()


def _planned(node: Node, unit: Unit) -> "MergePlan":
    """Plans the merge, and keeps the plan for the next shard."""
    merge, hints = _merge_of(unit), cast(BaseHints, unit.hints)
    key = hashlib.sha256(json.dumps([merge, hints], sort_keys=True).encode()).hexdigest()

    def plan() -> "MergePlan":
        if local_directory(hints["locations"]) is None and (buckets := in_buckets(hints["locations"])):
            directory = node.kept_directory(f"merge-{key[:16]}")
            return plan_of(node, merge, node.bases.open_in_bucket(buckets[0], directory / "base"))
        return plan_of(node, merge, opened_checkpoint(node, merge["base"], hints))

    return node.kept("plan", key, plan)


def _merge_of(unit: Unit) -> MergeContent:
    return cast(MergeContent, {name: unit.content[name] for name in MergeContent.__annotations__})


def plan_of(node: Node, merge: MergeContent, checkpoint: Checkpoint) -> "MergePlan":
    """Plans the merge of `merge_content` into the checkpoint."""
    from composer.merge.plan import plan_merge

    members = [(fetched(node, row["files"], row["name"]), parse_weight(row["weight"])) for row in merge["members"]]
    rounding = parse_rounding(**merge["rounding"]) if merge["rounding"] else None
    return plan_merge(checkpoint, members, merge["method"], merge["settings"], merge["dtype"], rounding)


def _plan(node: Node, unit: Unit, _count: Count) -> PlanRow:
    plan = _planned(node, unit)
    shards: list[PlannedShard] = [
        {
            "file": shard.file,
            "size_bytes": shard.size_bytes,
            "rewritten_bytes": sum(tensor.target.size_bytes for tensor in shard.tensors if not tensor.copied),
            "layout": layout_of(plan, shard),
        }
        for shard in plan.shards
    ]
    decoded = any(tensor.decoded for shard in plan.shards for tensor in shard.tensors)
    return {"shards": shards, "decoded": decoded}


def layout_of(plan: "MergePlan", shard: "ShardPlan") -> str:
    """Hashes the shard's header and the list of base tensors read with it. Locations may hold the same weights in other
    files or in another order."""
    from composer.merge.stream import unwritten

    unread = [[file.name, entry.name] for file, entry in unwritten(plan, shard)]
    return hashlib.sha256(shard.head + json.dumps(unread).encode()).hexdigest()


def _stream(node: Node, unit: Unit, count: Count) -> ShardRow:
    from composer.deltas.tensors import torch_device
    from composer.merge.chunks import Rewriter
    from composer.merge.stream import stream_shard

    plan, content = _planned(node, unit), cast(ShardContent, unit.content)
    shard = next((shard for shard in plan.shards if shard.file == content["file"]), None)
    if shard is None or layout_of(plan, shard) != content["layout"]:
        raise Mismatch(
            "base_changed",
            f"The layout of the base's files at {plan.checkpoint.path} differs from that of the files used to plan the "
            "merge.",
            subject=content["file"],
            next_step="Give all nodes the same files: one location, or copies of it.",
        )
    rewriter = Rewriter(torch_device("auto"), plan.rounding)
    writer = node.store.begin_write(shard.size_bytes)
    with uploads.aborted_on_error(writer):
        made = stream_shard(plan, shard, _StoreSink(writer), rewriter, count)
    return cast(ShardRow, {**made.to_json(), "server_copied_bytes": writer.copied_bytes})


def _texts(node: Node, unit: Unit, _count: Count) -> MergedRow:
    from composer.deltas.tensors import torch_device
    from composer.merge.run import report_of, write_texts
    from composer.merge.stream import StreamedShard

    plan = _planned(node, unit)
    rows: list[ShardRow] = json.loads(node.shared(unit.content["shards"]))
    written = _written([StreamedShard.from_json(row) for row in rows])
    with node.scratch() as directory:
        write_texts(plan, directory, unit.content["note"], written.survivals)
        files = store_directory(node, directory)
    report = report_of(plan, written, "", 0.0, torch_device("auto")).to_json()
    del report["out_dir"]
    copied = sum(row["server_copied_bytes"] for row in rows)
    return {"files": to_rows(files), "report": {**report, "server_copied_bytes": copied}}


def _merge(node: Node, unit: Unit, count: Count) -> MergedRow:
    from composer.merge.run import run_merge

    merge = _merge_of(unit)
    with node.scratch() as directory:
        plan = plan_of(node, merge, base_checkpoint(node, merge["base"], cast(BaseHints, unit.hints)))
        report = run_merge(plan, directory / "model", progress=count, note=unit.content["note"]).to_json()
        del report["out_dir"]
        return {"files": to_rows(store_directory(node, directory / "model")), "report": report}


def _written(shards: Sequence["StreamedShard"]) -> "Written":
    from composer.merge.chunks import RewriteStats
    from composer.merge.shards import Written

    measured = RewriteStats()
    for shard in shards:
        measured.add(RewriteStats.from_json(shard.measured))
    survivals = {name: loss for shard in shards for name, loss in shard.survivals.items()}
    return Written(
        copied_bytes=sum(shard.copied_bytes for shard in shards),
        rewritten_bytes=sum(shard.rewritten_bytes for shard in shards),
        resumed_bytes=0,
        verified_rows=sum(loss.rows for loss in survivals.values()),
        survivals=survivals,
        measured=measured,
    )


def _shard_is_stored(node: Node, row: ShardRow) -> bool:
    return are_stored(node, [file_of(row)])


def proved_model(held: JobRun, work: CompositionRun, model: StoredModel, suites: Sequence[Suite]) -> StoredModel:
    """The model with the proof in its note, its card and its report. Raises RefusedOutput with `proof_failed`."""
    from composer.merge.proof import proof_prompts

    hints = base_hints(work.locations, work.base_bytes)
    content = {
        **merge_content(held, work),
        "files": to_rows(model.files),
        "prompts": [asdict(prompt) for prompt in proof_prompts(suites, work.phrases)],
    }
    unit = Unit(name="proof", content=content, hints=hints)
    ((_, made),) = held.engine.map(PROOF, [unit], needs_of_model(work.lock.base, hints), held.check)
    changed = {file.path: file for file in from_rows(made["files"])}
    held.made.update(file.sha256 for file in changed.values())
    files = [changed.get(file.path, file) for file in model.files]
    return StoredModel(files=files, report={**model.report, "proof": made["proof"]})


def _prove(node: Node, unit: Unit, _count: Count) -> ProofRow:
    from composer.formats.checkpoints.card import CARD_FILE
    from composer.formats.checkpoints.staging import NOTE_FILE
    from composer.merge.proof import ProofPrompt, prove, record_proof

    merge = _merge_of(unit)
    plan = plan_of(node, merge, base_checkpoint(node, merge["base"], cast(BaseHints, unit.hints)))
    merged = fetched(node, unit.content["files"])
    node.drop("model")  # there may not be room for it and the two of the proof
    proof = prove(plan, merged, [ProofPrompt(**row) for row in unit.content["prompts"]])
    proof.refuse_failed()
    with node.scratch() as directory:
        for name in (NOTE_FILE, CARD_FILE):
            shutil.copyfile(merged / name, directory / name)
        record_proof(directory, proof)
        return {"files": to_rows(store_directory(node, directory)), "proof": proof.to_json()}


PLAN = Task(name="merge plan", version=2, run=_plan, intact=always_intact)
SHARD = Task(name="merge shard", version=1, run=_stream, intact=_shard_is_stored)
TEXTS = Task(name="merge texts", version=2, run=_texts, intact=files_are_stored)
MERGE = Task(name="merge on a disk", version=2, run=_merge, intact=files_are_stored)
PROOF = Task(name="proof", version=2, run=_prove, intact=files_are_stored)
