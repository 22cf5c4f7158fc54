"""Merges that stream from a base in a bucket to the store, shard by shard: no checkpoint is on this host's disk."""

import json
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import TYPE_CHECKING, Any

from composer.errors import Mismatch
from composer.formats.checkpoints.checkpoint import local_directory
from composer.formats.checkpoints.files import StoredFile
from composer.formats.checkpoints.hashing import architecture_digest, weights_digest
from composer.formats.checkpoints.staging import staged_directory
from registry.domain.access.audit import Actor
from registry.domain.compositions import compositions
from registry.formats.manifest import ManifestFile
from registry.formats.references import Digest, parse_reference
from registry.hub_client.address import SCHEME as HUB
from registry.storage.blobs import BlobWriter
from registry.transfer import uploads
from registry.transfer.bases import in_buckets, open_in_bucket
from registry.transfer.resources import Resources
from registry.worker.composition import CompositionRun, ProgressCount, read_composition, store
from registry.worker.runner import JobRun

if TYPE_CHECKING:
    from composer.merge.plan import MergePlan
    from composer.merge.shards import Written
    from composer.merge.stream import Origin, StreamedShard

Row = dict[str, Any]
"""A streamed file as JSON: the fields of `StreamedShard`, and `server_copied_bytes`, which the store copied itself."""
Count = Callable[[int], None]
_TEXTS_BYTES = 64 << 20


def location_to_stream(work: CompositionRun) -> str | None:
    """The base's location in a bucket, if its merge is to stream from there; None if it is made on this host's disk.

    That is so for a base that is on this machine or on a hub; for a merged model that suites load to evaluate it; and
    for a fitted method, whose factors are made by a base in memory.
    """
    elsewhere = local_directory(work.locations) is None and not any(url.startswith(HUB) for url in work.locations)
    loaded = bool(work.evaluated) and not work.recipe.adapter
    if not elsewhere or loaded or work.settings.pipeline.fitted:
        return None
    return next(iter(in_buckets(work.locations)), None)


def shards_to_merge(resources: Resources, composition_id: int, location: str) -> list[Row]:
    """The shards of a composition's merge: `file`, `size_bytes`, and `rewritten_bytes` of them."""
    with _planned(resources, composition_id, location, _ignore) as merge:
        return [
            {
                "file": shard.file,
                "size_bytes": shard.size_bytes,
                "rewritten_bytes": sum(one.target.size_bytes for one in shard.tensors if not one.copied),
            }
            for shard in merge.plan.shards
        ]


def merge_shards(
    resources: Resources, composition_id: int, location: str, shards: Collection[str], count: Count | None = None
) -> list[Row]:
    """Streams these shards of a composition's merge from the base at `location` into blobs, and returns their rows.

    Needs nothing of the process that runs the job, so that any host may do some of the shards. `count` is called with
    the bytes just written, and may raise. The base is not verified before `refuse_other_base` has seen the rows of all
    shards. Raises what `stream_shard` raises, NotAllowed if the creator's role was revoked, and Unavailable.
    """
    with _planned(resources, composition_id, location, count or _ignore) as merge:
        return [merge.stream(shard.file) for shard in merge.plan.shards if shard.file in shards]


def refuse_other_base(work: CompositionRun, rows: Iterable[Row]) -> None:
    """Raises Mismatch unless all bytes that the shards have read are the locked base's."""
    hashes = {name: digest for row in rows for name, digest in row["tensor_hashes"].items()}
    tensors = work.architecture.tensors.items()
    table = ((name, spec.dtype, spec.shape, hashes.get(name, "")) for name, spec in tensors)
    if weights_digest(table) != work.lock.base:
        raise _other_base(work, "do not have the weights of")


def merge_streamed(held: JobRun, work: CompositionRun, location: str) -> None:
    """The step: streams all shards, verifies the base, and leaves the small files in the model's directory.

    After a crash on this host, shards that are in the store are not made again.
    """
    started = monotonic()
    with _planned(held.resources, work.composition_id, location, held.check) as merge:
        merge.count = ProgressCount(held, "bytes", merge.plan.size_bytes)
        done = {row["file"]: row for row in streamed_files(work) if uploads.has_bytes(held.resources, file_of(row))}
        for shard in merge.plan.shards:
            if shard.file in done:
                merge.count(shard.size_bytes)
            else:
                done[shard.file] = merge.stream(shard.file)
                _write(work, done.values())
        rows = [done[shard.file] for shard in merge.plan.shards]
        refuse_other_base(work, rows)
        report = merge.write_texts(rows, work, monotonic() - started)
    store(held, work, merge=report)


def streamed_files(work: CompositionRun) -> list[Row]:
    """The rows of the shards that are in the store; none if the model is made on this host's disk."""
    rows = _rows_file(work)
    return json.loads(rows.read_text(encoding="utf-8")) if rows.is_file() else []


def file_of(row: Mapping[str, Any]) -> ManifestFile:
    """A row as a file of a release."""
    return ManifestFile(row["file"], row["size_bytes"], Digest(row["sha256"]))


def _rows_file(work: CompositionRun) -> Path:
    return work.directory / "streamed.json"


def _write(work: CompositionRun, rows: Iterable[Row]) -> None:
    work.directory.mkdir(parents=True, exist_ok=True)
    staging = _rows_file(work).with_suffix(".partial")
    staging.write_text(json.dumps(list(rows)), encoding="utf-8")
    staging.replace(_rows_file(work))


def _ignore(_count: int = 0) -> None:
    """Counts nothing."""


@dataclass(frozen=True, slots=True)
class _StoreSink:
    """A shard's `Sink`, in the store."""

    writer: BlobWriter

    def write(self, block: memoryview, origin: "Origin | None") -> None:
        source: StoredFile | None = origin.file if origin is not None else None
        self.writer.write(block, source, origin.offset if origin is not None else 0)


@dataclass(slots=True)
class _Merge:
    """A planned merge, whose base is in a bucket."""

    resources: Resources
    actor: Actor
    namespace: str
    plan: "MergePlan"
    count: Count

    def stream(self, name: str) -> Row:
        from composer.deltas.tensors import torch_device
        from composer.merge.chunks import Rewriter
        from composer.merge.stream import stream_shard

        (shard,) = (shard for shard in self.plan.shards if shard.file == name)
        rewriter = Rewriter(torch_device("auto"), self.plan.rounding)
        writer = self.resources.store.begin_write(shard.size_bytes)
        with uploads.aborted_on_error(writer):
            made = stream_shard(self.plan, shard, _StoreSink(writer), rewriter, self.count)
            row = made.to_json()
            uploads.store_written(self.resources, self.actor, self.namespace, file_of(row), writer)
        return {**row, "server_copied_bytes": writer.copied_bytes}

    def write_texts(self, rows: Sequence[Row], work: CompositionRun, seconds: float) -> Row:
        """Writes all files but the weights into the model's directory, and returns the merge's report."""
        from composer.deltas.tensors import torch_device
        from composer.merge.run import report_of, write_texts
        from composer.merge.stream import StreamedShard

        shards = [StreamedShard.from_json(row) for row in rows]
        survivals = {name: loss for shard in shards for name, loss in shard.survivals.items()}
        with staged_directory(work.model_directory, _TEXTS_BYTES) as staging:
            write_texts(self.plan, staging, work.note, survivals)
        report = report_of(self.plan, _written(shards), "", seconds, torch_device("auto")).to_json()
        copied = sum(row["server_copied_bytes"] for row in rows)
        return {**{key: value for key, value in report.items() if key != "out_dir"}, "server_copied_bytes": copied}


def _written(shards: Sequence["StreamedShard"]) -> "Written":
    from composer.merge.shards import Written

    survivals = {name: loss for shard in shards for name, loss in shard.survivals.items()}
    return Written(
        copied_bytes=sum(shard.copied_bytes for shard in shards),
        rewritten_bytes=sum(shard.rewritten_bytes for shard in shards),
        resumed_bytes=0,
        verified_rows=sum(loss.rows for loss in survivals.values()),
        survivals=survivals,
    )


@contextmanager
def _planned(resources: Resources, composition_id: int, location: str, count: Count) -> Generator[_Merge]:
    """Plans a composition's merge. Adapters and the base's small files are in a directory of this call's own, so that
    several processes of a host do not meet."""
    from composer.merge.plan import plan_merge

    work = read_composition(resources, composition_id)
    with resources.read() as session:
        composition, _ = compositions.find(session, composition_id)
        actor = compositions.creator(session, composition, resources.clock())
    namespace = parse_reference(work.recipe.model or "").repository.namespace
    with TemporaryDirectory(dir=resources.work_directory, prefix="stream-") as name:
        directory = Path(name)
        checkpoint = open_in_bucket(resources.settings, location, directory / "base")
        if architecture_digest(checkpoint.architecture) != architecture_digest(work.architecture):
            raise _other_base(work, "do not have the tensors of")
        lock, members = work.lock, work.members_in(directory, resources, lambda: count(0))
        plan = plan_merge(checkpoint, members, lock.method, lock.settings, lock.dtype, lock.rounding)
        yield _Merge(resources, actor, namespace, plan, count)


def _other_base(work: CompositionRun, what: str) -> Mismatch:
    locations = ", ".join(in_buckets(work.locations))
    return Mismatch(
        "base_changed",
        f"The objects at {locations} {what} the base {work.lock.base[:12]}.",
        subject=work.lock.base,
        next_step="Restore them, or register their current content as another base.",
    )
