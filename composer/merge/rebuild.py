"""Verifies a merged checkpoint against its note: repeats the merge from base and adapters and compares. Writes nothing.

On one machine, the same inputs give the same bytes for any number of threads. On another machine, float32 products may
differ in their last bit before rounding. So elements off by one step are counted separately from larger differences.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch

from composer.deltas.tensors import torch_device, torch_threads
from composer.errors import InvalidFile, Mismatch
from composer.formats.adapters.layouts import CONFIG_FILE, WEIGHTS_FILE
from composer.formats.adapters.provenance import AdapterUse, parse_use
from composer.formats.checkpoints.checkpoint import INDEX_FILE, Checkpoint, read_json
from composer.formats.checkpoints.files import LocalFile, StoredFile, local_file, read_range
from composer.formats.checkpoints.hashing import hash_file
from composer.formats.checkpoints.header import PICKLE_SUFFIXES
from composer.formats.checkpoints.staging import NOTE_FILE
from composer.formats.recipes.methods import parse_settings
from composer.formats.recipes.rounding import Rounding, parse_rounding
from composer.merge.chunks import Chunk, Rewriter, chunks_of, prepare
from composer.merge.copying import CopiedRange, copied_ranges, equal, pieces
from composer.merge.io.source import Source, source_rows
from composer.merge.plan import MergePlan, plan_merge
from composer.merge.run import index_of
from composer.merge.shards import Progress, ShardPlan

_ROUNDING_SHARE = {"F64": 1.0, "F32": 1.0, "F16": 8e-3, "BF16": 1e-3}
"""The share of a tensor's elements that may be off by one step on another machine, plus a few in a small tensor.
float32's last bit decides a rounding to 8 bits about once in 10,000 times, and to float16's 11 eight times as often."""
_A_FEW = 8
_VALUES = "differs by"
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class FileDifference:
    """`neighbours` elements differ by one step of their dtype, `others` by more; `why` holds any other reason."""

    file: str
    neighbours: int
    others: int
    why: str


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """The result of repeating a merge: `same` files are equal byte by byte. `earlier` is the method with its version,
    if the note names an older version than the current one."""

    same: tuple[str, ...]
    different: tuple[FileDifference, ...]
    earlier: str = ""

    @property
    def verdict(self) -> str:
        """`same`, `rounding` (only neighbours: another machine's float32), `earlier` (values differ, which is
        inconclusive for an earlier version of the method) or `different`."""
        if not self.different:
            return "same"
        if not any(difference.others or difference.why for difference in self.different):
            return "rounding"
        values = all(difference.why.startswith(_VALUES) or not difference.why for difference in self.different)
        return "earlier" if self.earlier and values else "different"

    def to_json(self) -> dict[str, Any]:
        return {"verdict": self.verdict, **asdict(self)}


def plan_rebuild(merged: Path, checkpoint: Checkpoint, adapters: Sequence[Path]) -> MergePlan:
    """The plan described by the note in `merged` (adaptory.json), on this base and the adapters in any order.

    Raises InvalidFile for a directory without such a note, Mismatch for a missing or different adapter, and what
    `plan_merge` raises.
    """
    note = read_json(merged / NOTE_FILE, "missing_note", "Only results of `adaptory merge` or a composition have one.")
    if note.get("made") != "merge":
        raise _bad_note("does not describe a merge")
    parsed = _parsed_note(note)
    digests = {path: hash_file(path / WEIGHTS_FILE) for path in adapters}
    used = [(_merged(adapter, digests), adapter.weight) for adapter in parsed.adapters]
    for path, digest in digests.items():
        if digest not in {adapter.digest for adapter in parsed.adapters}:
            raise Mismatch(
                "other_adapter", f"{path.name} ({digest[:12]}) is not one of the merged adapters.", subject=path.name
            )
    return plan_merge(
        checkpoint,
        used,
        parsed.method,
        parsed.settings,
        parsed.dtype,
        parsed.rounding,
        tokenizer_as_before="tokenizer" not in note,
    )


def _merged(use: AdapterUse, digests: Mapping[Path, str]) -> Path:
    """The path of the adapter that the note names, found by the digest of its weights."""
    same = [path for path, digest in digests.items() if digest == use.digest]
    for path in same:
        if use.config in (None, hash_file(path / CONFIG_FILE)):
            return path
    why = f": {CONFIG_FILE} differs" if same else f" ({use.digest[:12]})"
    raise Mismatch(
        "other_adapter",
        f"None of the given adapters is the {use.name} that was merged{why}.",
        subject=use.name,
        next_step="Pull the releases that the merged one names as its inputs.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _MergeInputs:
    """The inputs of a merge, as its note states them."""

    adapters: tuple[AdapterUse, ...]
    method: str
    settings: Mapping[str, object]
    dtype: str | None
    rounding: Rounding


def _parsed_note(note: Mapping[str, Any]) -> _MergeInputs:
    """Parses the note, which is untrusted. Raises InvalidFile for missing or mistyped entries."""
    try:
        method, settings, dtype = note["method"], note["settings"], note["dtype"]
        if not (isinstance(method, str) and isinstance(settings, dict) and isinstance(dtype, str | None)):
            raise TypeError("method, settings or dtype")
        adapters = tuple(parse_use(row) for row in note["adapters"])
        rounding = parse_rounding(**note["rounding"])
    except (KeyError, TypeError) as error:
        raise _bad_note(f"does not name all inputs of the merge ({error})") from error
    return _MergeInputs(
        adapters=adapters, method=method, settings=cast("dict[str, object]", settings), dtype=dtype, rounding=rounding
    )


def _bad_note(why: str) -> InvalidFile:
    next_step = "Only results of `adaptory merge` or a composition can be rebuilt."
    return InvalidFile("bad_note", f"{NOTE_FILE} {why}.", subject=NOTE_FILE, next_step=next_step)


def rebuild(plan: MergePlan, merged: Path, device: str = "auto", progress: Progress | None = None) -> Rebuilt:
    """Repeats the plan's files chunk by chunk and compares them with those in `merged`. Uses as much memory as a merge.

    Compares weights, config and index, and the side files (tokenizer, licence) with the base's. `progress` is called
    from several threads with the bytes just done, `plan.size_bytes` in total. Raises what a merge raises.
    """
    differences = [
        *_side_files(plan, merged),
        *_more_weights(plan, merged),
        *_weights(plan, merged, Rewriter(torch_device(device), plan.rounding), progress or (lambda count: None)),
    ]
    same = tuple(
        difference.file
        for difference in differences
        if not difference.neighbours and not difference.others and not difference.why
    )
    # A note without a version is of the first.
    made: object = read_json(merged / NOTE_FILE, "missing_note", "Make the merge again.").get("method_version", 1)
    is_earlier = isinstance(made, int) and made < parse_settings(plan.method, plan.settings).version
    different = tuple(difference for difference in differences if difference.file not in same)
    return Rebuilt(same, different, f"{plan.method} {made}" if is_earlier else "")


def _side_files(plan: MergePlan, merged: Path) -> Iterator[FileDifference]:
    """Compares config and index, and the side files that a merge copies; files that a release adds (a card) are
    ignored."""
    texts = {"config.json": plan.config} | ({} if plan.checkpoint.index is None else {INDEX_FILE: index_of(plan)})
    for name in (*texts, *plan.side_files.files):
        path = merged / name
        if not path.is_file():
            why = "is missing"
        elif name in texts:
            same = read_json(path, "missing", "Make the merge again.") == json.loads(json.dumps(texts[name]))
            why = "" if same else "has different contents"
        else:
            why = "" if hash_file(path) == hash_file(plan.side_files.files[name]) else "is another"
        yield FileDifference(name, 0, 0, why)


def _more_weights(plan: MergePlan, merged: Path) -> list[FileDifference]:
    """Weight files that the merge did not write, which a loader may mistake for the model's."""
    made = {shard.file for shard in plan.shards}
    weights = sorted(path.name for path in merged.iterdir() if path.suffix in {".safetensors", *PICKLE_SUFFIXES})
    return [FileDifference(name, 0, 0, "does not belong to this merge") for name in weights if name not in made]


def _weights(plan: MergePlan, merged: Path, rewriter: Rewriter, report: Progress) -> Iterable[FileDifference]:
    with ExitStack() as stack:
        stack.enter_context(torch_threads(1))
        pool = stack.enter_context(ThreadPoolExecutor(max(2, os.cpu_count() or 1), "rebuild"))
        for shard in plan.shards:
            path = merged / shard.file
            if not path.is_file():
                yield FileDifference(shard.file, 0, 0, "is missing")
            elif path.stat().st_size != shard.size_bytes:
                yield FileDifference(shard.file, 0, 0, f"has {path.stat().st_size} bytes, not {shard.size_bytes}")
            else:
                yield _compared(shard, path, _Comparing(rewriter, report), pool)


@dataclass(frozen=True, slots=True)
class _Comparing:
    rewriter: Rewriter
    report: Progress

    def copied(self, part: CopiedRange, target: LocalFile) -> int:
        """The number of bytes in pieces that differ."""
        self.report(part.size_bytes)
        return 0 if equal(part, local_file(part.file).descriptor, target.descriptor) else part.size_bytes

    def chunk(self, chunk: Chunk, target: StoredFile) -> tuple[int, int]:
        """(neighbours, others) among the chunk's elements."""
        self.report(chunk.size_bytes)
        again = self.rewriter.computed(chunk, chunk.work.plan.file)
        work = chunk.work
        there = source_rows(Source(target, work.plan.target, work.columns), chunk.begin, chunk.end)
        return steps_apart(again, there)


def _compared(shard: ShardPlan, path: Path, comparing: _Comparing, pool: ThreadPoolExecutor) -> FileDifference:
    neighbours = others = 0
    why = ""
    target = LocalFile(path)
    if read_range(target, 0, len(shard.head)) != shard.head:
        why = "has a different header"
    comparing.report(len(shard.head))
    for part in copied_ranges(shard.tensors):
        different = sum(pool.map(lambda piece: comparing.copied(piece, target), pieces(part)))
        why = why or ("has different bytes where the base was copied" if different else "")
    for tensor in shard.tensors:
        if tensor.copied:
            continue
        work = prepare(tensor, comparing.rewriter.device)
        counts = list(pool.map(lambda chunk: comparing.chunk(chunk, target), chunks_of(work)))
        near, far = (sum(count[which] for count in counts) for which in (0, 1))
        neighbours, others = neighbours + near, others + far
        if far:
            why = why or f"{_VALUES} more than a step in {far} elements of {tensor.target.name}"
        # Elements that may be neighbours; all in float32, whose last bit is what differs.
        if near > max(_A_FEW, _ROUNDING_SHARE.get(tensor.target.dtype, 0.0) * tensor.target.spec.elements):
            why = why or f"{_VALUES} one step in {near} elements of {tensor.target.name}, more than rounding explains"
    return FileDifference(shard.file, neighbours, others, why)


def steps_apart(one: torch.Tensor, other: torch.Tensor) -> tuple[int, int]:
    """(elements one step apart in their dtype, elements further apart); equal elements are not counted."""
    integers = _INTEGERS[one.dtype.itemsize]
    first, second = one.contiguous().view(integers), other.contiguous().view(integers)
    if torch.equal(first, second):
        return 0, 0
    first, second = first.long(), second.long()
    if one.is_floating_point():
        # Sign and magnitude as one ordered number: -0 equals 0, and each step is 1.
        lowest = torch.iinfo(integers).min
        first, second = (torch.where(bits < 0, lowest - bits, bits) for bits in (first, second))
    apart = (first - second).abs()
    if not one.is_floating_point():
        return 0, int((apart > 0).sum())
    differing = one.contiguous().view(integers) != other.contiguous().view(integers)
    near = differing & (apart <= 1) & one.isfinite() & other.isfinite()
    return int(near.sum()), int((differing & ~near).sum())
