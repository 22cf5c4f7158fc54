"""Merge adapters into a checkpoint: plan which shard is copied and which rewritten, then run the plan and verify it."""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from composer.checks import structural
from composer.chunks import TensorPlan
from composer.delta import Delta, Replacement
from composer.errors import Mismatch, NotSupported
from composer.findings import Finding
from composer.formats.checkpoint import INDEX_FILE, Checkpoint
from composer.formats.facts import WEIGHTS_FILE
from composer.formats.header import FLOAT_DTYPES, TensorSpec, encode_header, parse_header
from composer.formats.naming import embedding_tensors
from composer.hashing import architecture_digest, hash_file
from composer.methods import combine_deltas
from composer.output import NOTE_FILE, copy_side_files, write_json, writing_aside
from composer.settings import parse_settings
from composer.shards import ShardPlan, write_shards
from composer.tensors import TORCH_DTYPES, map_tensor, torch_device
from composer.variants import LoadedAdapter, load_deltas

_DTYPES = {"bf16": "BF16", "bfloat16": "BF16", "fp16": "F16", "float16": "F16", "fp32": "F32", "float32": "F32"}
_SPARE_BYTES = 8 << 20  # index, notes and the file system's own


@dataclass(frozen=True, slots=True)
class AdapterUse:
    """One input of a merge: `digest` is the sha256 of its weights file."""

    name: str
    weight: float
    digest: str


@dataclass(frozen=True, slots=True)
class MergePlan:
    """All that a merge will do, decided before a byte is written."""

    checkpoint: Checkpoint
    shards: tuple[ShardPlan, ...]
    config: Mapping[str, Any]
    dtype: str | None
    method: str
    settings: Mapping[str, object]
    adapters: tuple[AdapterUse, ...]
    findings: tuple[Finding, ...]

    @property
    def touched(self) -> list[str]:
        return [tensor.target.name for shard in self.shards for tensor in shard.tensors if tensor.deltas]

    @property
    def size_bytes(self) -> int:
        return sum(shard.size_bytes for shard in self.shards)

    def to_json(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "settings": dict(self.settings),
            "dtype": self.dtype,
            "adapters": [asdict(adapter) for adapter in self.adapters],
            "copied_shards": [shard.file for shard in self.shards if not shard.rewritten],
            "rewritten_shards": [shard.file for shard in self.shards if shard.rewritten],
            "touched_tensors": self.touched,
            "size_bytes": self.size_bytes,
            "findings": [asdict(finding) for finding in self.findings],
        }


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What a merge did. Bytes were copied by the kernel or rewritten through float32; copied ones were compared."""

    out_dir: str
    touched_tensors: int
    shards: int
    copied_bytes: int
    rewritten_bytes: int
    verified_rows: int
    seconds: float
    device: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def plan_merge(
    checkpoint: Checkpoint,
    adapters: Sequence[tuple[Path, float]],
    method: str = "stack",
    settings: Mapping[str, object] | None = None,
    dtype: str | None = None,
) -> MergePlan:
    """Plan the merge of (adapter directory, weight) pairs into a checkpoint. Loads the adapters' factors, no base
    weights.

    `dtype` (bf16, fp16, fp32) casts every float tensor; None keeps each tensor's own. Raises Mismatch, NotSupported and
    InvalidFile for whatever cannot be merged truly.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise NotSupported(
            "dtype", f"{dtype!r} is no output dtype.", subject=dtype, next_step=f"Use one of {', '.join(_DTYPES)}."
        )
    parsed = parse_settings(method, settings or {})
    loaded = [load_deltas(path, checkpoint.architecture) for path, _ in adapters]
    for adapter in loaded:
        _refuse_changed_base(checkpoint, adapter)
    deltas: dict[str, list[Delta]] = defaultdict(list)
    for delta in combine_deltas(loaded, [weight for _, weight in adapters], method, parsed):
        deltas[delta.weight].append(delta)
    config = dict(checkpoint.config)
    head = _untied_head(checkpoint, loaded) if parsed["tied"] == "untie" else None
    if head is not None:
        config["tie_word_embeddings"] = False
    if dtype is not None:
        config["dtype" if "dtype" in config else "torch_dtype"] = str(TORCH_DTYPES[_DTYPES[dtype]]).removeprefix(
            "torch."
        )
    uses = [
        AdapterUse(one.name, weight, hash_file(one.path / WEIGHTS_FILE))
        for one, (_, weight) in zip(loaded, adapters, strict=True)
    ]
    return MergePlan(
        checkpoint=checkpoint,
        shards=_plan_shards(checkpoint, deltas, head, None if dtype is None else _DTYPES[dtype]),
        config=config,
        dtype=dtype,
        method=method,
        settings=parsed,
        adapters=tuple(uses),
        findings=tuple(structural(loaded, parsed)),
    )


def run_merge(
    plan: MergePlan,
    out_dir: Path,
    device: str = "auto",
    progress: Callable[[int], None] | None = None,
    note: Mapping[str, Any] | None = None,
) -> MergeReport:
    """Write the merged checkpoint to `out_dir`: aside, verified, renamed. Memory is a few chunks a thread besides the
    factors.

    `device` is `auto` (CUDA when there is one), `cpu` or `cuda:N`. `progress` is called from several threads with the
    bytes just done, `plan.size_bytes` in all. `note` (a recipe, a lock) goes into adaptory.json. Raises RefusedOutput
    for a directory that exists, a full disk, a value too large for the output dtype or a result that verification
    does not confirm.
    """
    started = time.monotonic()
    chosen = torch_device(device)
    with writing_aside(out_dir, plan.size_bytes + _SPARE_BYTES) as aside:
        copy_side_files(plan.checkpoint.path, aside)
        write_json(aside / "config.json", plan.config)
        if plan.checkpoint.index is not None:
            write_json(aside / INDEX_FILE, _index(plan))
        write_json(aside / NOTE_FILE, _note(plan, note))
        written = write_shards(plan.shards, aside, chosen, progress)
    return MergeReport(
        out_dir=str(out_dir),
        touched_tensors=len(plan.touched),
        shards=len(plan.shards),
        copied_bytes=written.copied_bytes,
        rewritten_bytes=written.rewritten_bytes,
        verified_rows=written.verified_rows,
        seconds=time.monotonic() - started,
        device=str(chosen),
    )


def _plan_shards(
    checkpoint: Checkpoint, deltas: Mapping[str, Sequence[Delta]], head: str | None, dtype: str | None
) -> tuple[ShardPlan, ...]:
    """The output's files: the base's layout, cast where asked, an untied head beside the embedding it came from."""
    shards: list[ShardPlan] = []
    embedding = embedding_tensors(checkpoint.architecture.tensors)[0] if head is not None else ""
    for file, header in checkpoint.shards.items():
        sources = {name: checkpoint.locate(name) for name in header.tensors}
        if head is not None and (
            head in sources or (embedding in sources and head not in checkpoint.architecture.tensors)
        ):
            sources[head] = checkpoint.locate(embedding)
        specs = {name: _output_spec(entry.spec, name, dtype, deltas) for name, (_, entry) in sources.items()}
        unchanged = list(specs.items()) == [(name, entry.spec) for name, entry in header.tensors.items()]
        path = checkpoint.path / file
        head_bytes = _first_bytes(path, header.data_begin) if unchanged else encode_header(specs, header.metadata)
        size = len(head_bytes) + sum(spec.size_bytes for spec in specs.values())
        targets = parse_header(head_bytes, size, subject=file).tensors
        tensors = tuple(
            TensorPlan(*sources[name], target, tuple(deltas.get(name, ()))) for name, target in targets.items()
        )
        shards.append(ShardPlan(file, path, head_bytes, size, tensors))
    return tuple(shards)


def _first_bytes(path: Path, count: int) -> bytes:
    with path.open("rb") as file:
        return file.read(count)


def _output_spec(spec: TensorSpec, name: str, dtype: str | None, deltas: Mapping[str, Sequence[Delta]]) -> TensorSpec:
    adding = any(not isinstance(delta, Replacement) for delta in deltas.get(name, ()))
    if adding and spec.dtype not in FLOAT_DTYPES:
        raise NotSupported("dtype", f"{name} is stored as {spec.dtype}, which nothing can be added to.", subject=name)
    return replace(spec, dtype=dtype) if dtype is not None and spec.dtype in FLOAT_DTYPES else spec


def _untied_head(checkpoint: Checkpoint, loaded: Sequence[LoadedAdapter]) -> str | None:
    """Name of the head's own tensor, when an adapter changes the tied one; None when nothing needs untying."""
    tied = [delta for adapter in loaded for delta in adapter.deltas if delta.tied]
    if not tied:
        return None
    heads = sorted({delta.module for delta in tied if delta.module.split(".")[-1] in ("lm_head", "embed_out")})
    default = "embed_out" if checkpoint.architecture.model_type == "gpt_neox" else "lm_head"
    return f"{heads[0] if heads else default}.weight"


def _refuse_changed_base(checkpoint: Checkpoint, adapter: LoadedAdapter) -> None:
    """PEFT saves a base weight beside an adapted embedding. If it is not this base's, the adapter fits another."""
    for weight, copy in adapter.base_copies.items():
        base = map_tensor(*checkpoint.locate(weight))
        same = all(torch.equal(a.float(), b.float()) for a, b in zip(base.split(4096), copy.split(4096), strict=True))
        if not same:
            message = f"{adapter.name} brings a {weight} that differs from the base's: it was trained on another base."
            raise Mismatch(
                "changed_base_layer", message, subject=weight, next_step="Merge it into the base it was trained on."
            )


def _index(plan: MergePlan) -> dict[str, Any]:
    weight_map = {tensor.target.name: shard.file for shard in plan.shards for tensor in shard.tensors}
    total = sum(tensor.target.size_bytes for shard in plan.shards for tensor in shard.tensors)
    old: Mapping[str, Any] = plan.checkpoint.index or {}
    return {
        "metadata": {**(old.get("metadata") or {}), "total_size": total},
        "weight_map": dict(sorted(weight_map.items())),
    }


def _note(plan: MergePlan, note: Mapping[str, Any] | None) -> dict[str, Any]:
    architecture = plan.checkpoint.architecture
    return {
        "made": "merge",
        "base": {"model_type": architecture.model_type, "architecture_digest": architecture_digest(architecture)},
        "adapters": [asdict(adapter) for adapter in plan.adapters],
        "method": plan.method,
        "settings": dict(plan.settings),
        "dtype": plan.dtype,
        "note": dict(note or {}),
    }
