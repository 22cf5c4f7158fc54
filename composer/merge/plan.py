"""Plans a merge before a byte is written: which files are copied, and which deltas are added to which tensors."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeGuard, cast

import torch

from composer.checks.bases import names_of
from composer.checks.check import check
from composer.deltas.delta import Delta, Replacement, RowwiseDelta
from composer.deltas.stored import stored_tensor
from composer.deltas.tensors import TORCH_DTYPES, torch_device
from composer.deltas.variants.load import LoadedAdapter, load_deltas
from composer.errors import Mismatch, NotSupported
from composer.findings import Finding, refuse_errors
from composer.formats.adapters.placement.naming import TIED_HEAD, is_head
from composer.formats.adapters.provenance import AdapterUse, adapter_use, files_of
from composer.formats.checkpoints.checkpoint import INDEX_FILE, Checkpoint, contained
from composer.formats.checkpoints.files import LocalFile, StoredFile, read_range
from composer.formats.checkpoints.hashing import Identity, identities
from composer.formats.checkpoints.header import (
    FLOAT_DTYPES,
    Header,
    TensorEntry,
    TensorSpec,
    encode_header,
    parse_header,
)
from composer.formats.checkpoints.renames import stored_name
from composer.formats.checkpoints.side_files import side_files
from composer.formats.checkpoints.tying import embedding_tensors, head_tensors
from composer.formats.recipes.methods import parse_settings
from composer.formats.recipes.rounding import Rounding
from composer.formats.recipes.weights import Weight
from composer.merge.chunks import TensorPlan
from composer.merge.grown import grown_vocabulary, refuse_uneven, with_new_rows
from composer.merge.quantized.dequantized import Dequantized, dequantized
from composer.merge.quantized.gap import quantized_bases
from composer.merge.reference import MergeReference, reference_of
from composer.merge.shards import ShardPlan
from composer.merge.side_files import SideFiles, planned_side_files
from composer.methods.combine import combine_parsed
from composer.methods.retention import Retention, retention_of
from composer.methods.spectral import Compression

_DTYPES = {"bf16": "BF16", "bfloat16": "BF16", "fp16": "F16", "float16": "F16", "fp32": "F32", "float32": "F32"}
_BYTES_VERSION = 8  # raised when the same inputs result in different bytes, so that no merge resumes an older version's


@dataclass(frozen=True, slots=True, kw_only=True)
class MergePlan:
    """Everything a merge will do, decided before a byte is written. `inputs` are the files that determine its bytes, as
    they were then. `retention` computes what is kept of each adapter, once; `reference` makes what the result should
    answer as. `compressions` have each module's loss where the method cuts to a rank. `strict`: a warning about the
    result ends the merge before the output appears."""

    checkpoint: Checkpoint
    shards: tuple[ShardPlan, ...]
    config: Mapping[str, Any]
    dtype: str | None
    method: str
    settings: Mapping[str, object]
    adapters: tuple[AdapterUse, ...]
    findings: tuple[Finding, ...]
    inputs: Mapping[Path, Identity]
    side_files: SideFiles
    retention: Callable[[], Retention]
    reference: Callable[[], MergeReference]
    compressions: tuple[Compression, ...] = ()
    rounding: Rounding = field(default_factory=Rounding)
    strict: bool = False

    @property
    def touched(self) -> list[str]:
        """The tensors that a delta is added to."""
        return [tensor.target.name for shard in self.shards for tensor in shard.tensors if tensor.deltas]

    @property
    def size_bytes(self) -> int:
        return sum(shard.size_bytes for shard in self.shards)

    @property
    def key(self) -> str:
        """12 hex digits, equal for plans that give the same bytes from unmodified inputs."""
        inputs = [[str(path), *identity] for path, identity in self.inputs.items()]
        described = [_BYTES_VERSION, str(self.checkpoint.path.absolute()), inputs, self.config, self.to_json()]
        return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()[:12]

    def to_json(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "settings": dict(self.settings),
            "dtype": self.dtype,
            "rounding": asdict(self.rounding),
            "adapters": [adapter.to_json() for adapter in self.adapters],
            "copied_shards": [shard.file for shard in self.shards if not shard.rewritten],
            "rewritten_shards": [shard.file for shard in self.shards if shard.rewritten],
            "touched_tensors": self.touched,
            "size_bytes": self.size_bytes,
            "findings": [finding.to_json() for finding in self.findings],
        }


def plan_merge(  # noqa: PLR0913
    checkpoint: Checkpoint,
    adapters: Sequence[tuple[Path, Weight | float]],
    method: str = "stack",
    settings: Mapping[str, object] | None = None,
    dtype: str | None = None,
    rounding: Rounding | None = None,
    device: str = "auto",
    *,
    tokenizer_as_before: bool = False,
    strict: bool = False,
) -> MergePlan:
    """Plans the merge of (adapter directory, weight) pairs into a checkpoint. Reads the adapters' factors, and a few
    rows of the base only if an adapter was trained on a quantized base. Methods compute factors on `device`.
    `dtype` (bf16, fp16, fp32) casts every float tensor; None keeps each tensor's own. `rounding` defaults to the
    nearest value. `tokenizer_as_before` is for a merge whose note names no tokenizer. `strict` makes warnings errors.
    Raises Mismatch, NotSupported or InvalidFile for anything that cannot be merged faithfully.
    """
    parsed, stored_dtype = parse_settings(method, settings), _stored_dtype(dtype)
    source = dequantized(checkpoint)
    vocabulary = grown_vocabulary(checkpoint, [path for path, _ in adapters])
    inputs = identities([*_files_of_base(checkpoint), *files_of(path for path, _ in adapters)])
    with ThreadPoolExecutor(1, "hash") as hashing:
        uses = [hashing.submit(adapter_use, path, weight) for path, weight in adapters]
        read = [load_deltas(path, vocabulary.architecture) for path, _ in adapters]
    together = _together(checkpoint, read, as_before=tokenizer_as_before, strict=strict)
    beside = planned_side_files(checkpoint.path, read, vocabulary, as_before=tokenizer_as_before)
    inputs |= identities(beside.files.values())
    loaded = [with_new_rows(checkpoint, _tokens_on_own_head(checkpoint, adapter), vocabulary) for adapter in read]
    weights = [weight for _, weight in adapters]
    _refuse_changed_bases(checkpoint, loaded)
    combined = combine_parsed(loaded, weights, parsed, device=torch_device(device))
    head = _untied_head(checkpoint, loaded) if combined.tied == "untie" else None
    deltas = _by_tensor(checkpoint, combined.deltas, head)
    refuse_uneven(vocabulary, deltas, head)
    layout = _Layout(
        checkpoint=checkpoint, dequantized=source, deltas=deltas, head=head, dtype=stored_dtype,
        vocabulary=vocabulary.rows,
    )  # fmt: skip
    findings = (*together, *combined.findings, *beside.findings, *quantized_bases(checkpoint, loaded))
    refuse_errors("This is not merged", findings, strict=strict)
    return MergePlan(
        checkpoint=checkpoint,
        shards=_plan_shards(layout),
        config=_config(source.config, bool(head or checkpoint.own_head), dtype, vocabulary.rows),
        dtype=dtype,
        method=method,
        settings=parsed.with_tied(combined.tied).to_json(),
        adapters=tuple(use.result() for use in uses),
        findings=findings,
        inputs=inputs,
        side_files=beside,
        retention=cache(partial(retention_of, loaded, weights, parsed, combined)),
        reference=partial(
            reference_of, loaded, weights, parsed, combined, vocabulary.rows, dequantized=bool(source.tensors)
        ),
        compressions=tuple(combined.compressions),
        rounding=rounding or Rounding(),
        strict=strict,
    )


def _files_of_base(checkpoint: Checkpoint) -> list[Path]:
    """The local files; one elsewhere refuses to be read once it has changed."""
    side = [contained(checkpoint.path, name) for name in ("config.json", INDEX_FILE, *side_files(checkpoint.path))]
    return [*(file.path for file in checkpoint.files.values() if isinstance(file, LocalFile)), *side]


def _together(
    checkpoint: Checkpoint, adapters: Sequence[LoadedAdapter], *, as_before: bool, strict: bool
) -> list[Finding]:
    """The findings of the check. Merges of before could have adapters with different tokenizers."""
    findings = check(adapters, names_of(checkpoint.path, checkpoint.config))
    findings = [finding for finding in findings if not (as_before and finding.code == "tokenizers_differ")]
    refuse_errors("These adapters cannot be merged", findings, strict=strict)
    return findings


def _stored_dtype(dtype: str | None) -> str | None:
    if dtype is not None and dtype not in _DTYPES:
        raise NotSupported(
            "dtype", f"Unknown output dtype {dtype!r}.", subject=dtype, next_step=f"Use one of {', '.join(_DTYPES)}."
        )
    return None if dtype is None else _DTYPES[dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """Determines the output's tensors: the base's, their changes, an untied head, a dtype for all, and the rows of a
    grown vocabulary (0: it does not grow)."""

    checkpoint: Checkpoint
    dequantized: Dequantized
    deltas: Mapping[str, Sequence[Delta]]
    head: str | None
    dtype: str | None
    vocabulary: int

    def sources(self, header: Header) -> dict[str, tuple[StoredFile, TensorEntry]]:
        """Sources by output name, for one of the base's files. An untied head goes into its embedding's file."""
        checkpoint, head = self.checkpoint, self.head
        left_out = self.dequantized.scales | self.second_copies
        sources = {name: checkpoint.locate(name) for name in header.tensors if name not in left_out}
        embedding = embedding_tensors(checkpoint.architecture.tensors)[0] if head is not None else ""
        beside = embedding in sources and head not in checkpoint.architecture.tensors
        if head is not None and (head in sources or beside):
            sources[head] = checkpoint.locate(embedding)
        return sources

    @property
    def second_copies(self) -> frozenset[str]:
        """Stored heads that duplicate an embedding that changes. Stochastic rounding would make the two copies differ,
        and loaders tie only equal tensors; without the duplicate there is nothing to compare."""
        architecture = self.checkpoint.architecture
        changed = self.dtype is not None or any(name in self.deltas for name in embedding_tensors(architecture.tensors))
        again = architecture.tied and self.head is None and changed
        return frozenset(head_tensors(architecture.tensors) if again else ())

    def spec(self, name: str, stored: TensorSpec) -> TensorSpec:
        """The output spec of a tensor. Raises NotSupported if nothing can be added to its dtype."""
        decoded = self.dequantized.tensors.get(name)
        spec = stored if decoded is None else TensorSpec(decoded.dtype, decoded.shape)
        full = [delta for delta in self.deltas.get(name, ()) if isinstance(delta, Replacement)]
        if self.vocabulary and full:
            spec = replace(spec, shape=tuple(full[0].tensor.shape))
        adding = any(not isinstance(delta, Replacement) for delta in self.deltas.get(name, ()))
        if adding and spec.dtype not in FLOAT_DTYPES:
            message = f"{name} is stored as {spec.dtype}, to which nothing can be added."
            raise NotSupported("dtype", message, subject=name, next_step="Use the unquantized base.")
        return replace(spec, dtype=self.dtype) if self.dtype is not None and spec.dtype in FLOAT_DTYPES else spec

    def tensor(self, source: tuple[StoredFile, TensorEntry], target: TensorEntry) -> TensorPlan:
        file, entry = source
        decoded = self.dequantized.tensors.get(entry.name)
        return TensorPlan(
            file=file, source=entry, target=target, deltas=tuple(self.deltas.get(target.name, ())), decoded=decoded
        )


def _plan_shards(layout: _Layout) -> tuple[ShardPlan, ...]:
    """The output's files: the base's, byte for byte unless a header changes."""
    shards: list[ShardPlan] = []
    for file, header in layout.checkpoint.shards.items():
        sources = layout.sources(header)
        if header.tensors and not sources:
            continue
        specs = {name: layout.spec(name, entry.spec) for name, (_, entry) in sources.items()}
        unchanged = list(specs.items()) == [(name, entry.spec) for name, entry in header.tensors.items()]
        source = layout.checkpoint.files[file]
        kept = bytes(read_range(source, 0, header.data_begin)) if unchanged else None
        head_bytes = kept or encode_header(specs, header.metadata)
        size = len(head_bytes) + sum(spec.size_bytes for spec in specs.values())
        targets = parse_header(head_bytes, size, subject=file).tensors
        tensors = tuple(layout.tensor(sources[name], target) for name, target in targets.items())
        shards.append(ShardPlan(file=file, source=source, head=head_bytes, size_bytes=size, tensors=tensors))
    return tuple(shards)


def _config(config: Mapping[str, Any], untied: bool, dtype: str | None, vocabulary: int) -> dict[str, Any]:
    """The base's config, including a nested language model's, with updated entries for tying, dtype and vocabulary
    size."""
    key = "dtype" if "dtype" in config else "torch_dtype"
    new: dict[str, Any] = {"tie_word_embeddings": False} if untied else {}
    new |= {} if dtype is None else {key: str(TORCH_DTYPES[_DTYPES[dtype]]).removeprefix("torch.")}
    document: dict[str, Any] = {**config, **new}
    new |= {"vocab_size": vocabulary} if vocabulary else {}
    document |= {"vocab_size": vocabulary} if vocabulary and "vocab_size" in config else {}
    for name, inner in config.items():
        if name.endswith("_config") and isinstance(inner, Mapping):
            own = cast("Mapping[str, Any]", inner)
            document[name] = {**own, **{known: value for known, value in new.items() if known in own}}
    return document


def _untied_head(checkpoint: Checkpoint, loaded: Sequence[LoadedAdapter]) -> str | None:
    """The name of the head's own tensor if an adapter changes the tied one; None if nothing needs untying. A head that
    the base stores keeps its name."""
    tied = [delta for adapter in loaded for delta in adapter.deltas if delta.tied]
    if not tied:
        return None
    stored = head_tensors(checkpoint.architecture.tensors)
    if len(stored) == 1:
        return stored[0]
    heads = sorted({delta.module for delta in tied if is_head(delta.module)})
    return stored_name(checkpoint.architecture.model_type, f"{heads[0] if heads else TIED_HEAD}.weight")


def _by_tensor(checkpoint: Checkpoint, deltas: Sequence[Delta], head: str | None) -> dict[str, list[Delta]]:
    """The deltas by output tensor. An untied head's tensor is named after its module, whose name may differ between
    files and memory."""
    by_tensor: dict[str, list[Delta]] = defaultdict(list)
    for delta in deltas:
        known = delta.weight in checkpoint.architecture.tensors or not is_head(delta.module)
        by_tensor[delta.weight if known or head is None else head].append(delta)
    return by_tensor


def _tokens_on_own_head(checkpoint: Checkpoint, adapter: LoadedAdapter) -> LoadedAdapter:
    """Copies new token rows to the head if the config says tied but the files do not. For trained tokens alone, PEFT
    follows the config: in training and merging, the embedding's new rows (no other table's) are the head's too."""
    head = checkpoint.own_head
    if head is None or any(_sets_tokens(delta) and delta.weight == head for delta in adapter.deltas):
        return adapter
    (embedding,) = embedding_tensors(checkpoint.architecture.tensors)
    new = [delta for delta in adapter.deltas if _sets_tokens(delta) and delta.weight == embedding]
    also = [replace(delta, module=head.removesuffix(".weight"), weight=head) for delta in new]
    return replace(adapter, deltas=(*adapter.deltas, *also)) if also else adapter


def _sets_tokens(delta: Delta) -> TypeGuard[RowwiseDelta]:
    return isinstance(delta, RowwiseDelta) and bool(delta.sets_rows)


def _refuse_changed_bases(checkpoint: Checkpoint, adapters: Sequence[LoadedAdapter]) -> None:
    """Refuses adapters whose copy of a base weight, which PEFT saves with an adapted embedding, differs from this
    base's."""
    copies = ((adapter, *copied) for adapter in adapters for copied in adapter.base_copies.items())
    for adapter, weight, copy in copies:
        base = stored_tensor(*checkpoint.locate(weight))
        known = copy[: len(base)]  # with a grown vocabulary, the copy includes the new tokens' rows
        same = all(torch.equal(a.float(), b.float()) for a, b in zip(base.split(4096), known.split(4096), strict=True))
        if not same:
            message = (
                f"{adapter.name} contains a {weight} that differs from the base's: it was trained on another base."
            )
            raise Mismatch("changed_base_layer", message, subject=weight)
