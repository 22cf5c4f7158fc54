"""Extracts a LoRA from a fine-tuned checkpoint: the difference to its base, each matrix cut to a rank.

Shapes: M x N a weight as stored, O outputs and I inputs of its module, R rank.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from composer.deltas.delta import Delta, Layout, LowRank, Replacement, spilled
from composer.deltas.stored import Factor, MappedFile, SpillFile, read_into
from composer.deltas.tensors import torch_device
from composer.errors import InvalidFile, Mismatch, NotSupported
from composer.evaluation.model import modules_bounded
from composer.export.peft import peft_form, write_adapter
from composer.findings import Finding, Severity
from composer.formats.adapters.placement.naming import TIED_HEAD, Target, find_weight, is_head
from composer.formats.adapters.placement.result import CONV1D_MODELS, shape_text
from composer.formats.adapters.tokenizers import chosen_tokenizer
from composer.formats.checkpoints.bounds import refuse_larger_than_its_tensors
from composer.formats.checkpoints.checkpoint import Checkpoint
from composer.formats.checkpoints.files import local_file
from composer.formats.checkpoints.hashing import architecture_digest, identities
from composer.formats.checkpoints.staging import refuse_existing
from composer.formats.checkpoints.tying import head_tensors
from composer.methods.matrix import Matrix
from composer.methods.spectral import Compression, compress_dense, total_loss
from composer.methods.structural import pair_for_head

USUAL_RANK = 32
"""The rank if neither a rank nor a share of the energy is given."""
MUCH_LOST = 0.3
"""A relative error above this is a warning."""
_CHECKED_TOGETHER = 1 << 20  # values
_NEVER_READ = (r"attn\.masked_bias$", r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")
"""Buffers that old versions of transformers stored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractReport:
    """The result. `compressions` give each matrix's loss from the cut to a rank, `ranks` count modules by rank;
    `saved` are the tensors that the adapter holds in full; `unchanged` counts tensors that equal the base's."""

    out_dir: str
    modules: int
    ranks: Mapping[int, int]
    saved: tuple[str, ...]
    unchanged: int
    size_bytes: int
    compressions: tuple[Compression, ...]
    findings: tuple[Finding, ...]

    @property
    def lost(self) -> float:
        """|Δ - Δ'| / |Δ| over all matrices."""
        return total_loss(self.compressions)

    def to_json(self) -> dict[str, Any]:
        rows = [asdict(compression) | {"relative": compression.relative} for compression in self.compressions]
        return asdict(self) | {"compressions": rows, "lost": self.lost}


def extract(  # noqa: PLR0913
    base: Checkpoint,
    finetuned: Checkpoint,
    out_dir: Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    device: str = "auto",
    progress: Callable[[int], None] = lambda _count: None,
) -> ExtractReport:
    """Writes the difference between `finetuned` and `base` as one PEFT adapter in float32, with s = 1.

    The weight of each linear layer and embedding becomes a pair of at most `rank` directions, or as many as hold the
    share `energy` of |Δ|² (USUAL_RANK if neither is given). Norms and biases that changed are saved in full. One matrix
    at a time is in memory, and decomposed on `device` (auto, cpu or cuda:N). `progress` gets the bytes of the base just
    compared.

    Raises RefusedOutput for an existing `out_dir`, before anything is read; Mismatch for checkpoints of different
    architectures and for equal ones; InvalidFile for a value that is not finite; NotSupported for a changed tensor that
    no adapter can hold; and what `write_adapter` raises.
    """
    refuse_existing(out_dir)
    slots = _slots(base, finetuned)
    if rank is None and energy is None:
        rank = USUAL_RANK
    files = [checkpoint.path / shard for checkpoint in (base, finetuned) for shard in checkpoint.shards]
    inputs = identities([*files, *(checkpoint.path / "config.json" for checkpoint in (base, finetuned))])
    work = _Extraction(base, finetuned, (rank, energy), torch_device(device))
    for name, slot in slots.items():
        if slot.theirs:
            work.take(name, slot)
        progress(base.architecture.tensors[name].size_bytes)
    _refuse_no_matrix(work, base, finetuned)
    form = peft_form(work.complete(slots))
    fields = {
        "base_model_name_or_path": str(base.path),
        "task_type": "CAUSAL_LM",
        "fan_in_fan_out": base.architecture.model_type in CONV1D_MODELS,
    }
    note = {
        "made": "extract",
        "architecture_digest": architecture_digest(base.architecture),
        "base": base.path.name,
        "finetuned": finetuned.path.name,
        "settings": {"rank": rank, "energy": energy},
        "lost": total_loss(work.compressions),
    }
    tokenizer = chosen_tokenizer(base.path, [(finetuned.path.name, finetuned.path)]).files
    size = write_adapter(form, out_dir, fields, note, inputs, tokenizer)
    return ExtractReport(
        out_dir=str(out_dir),
        modules=len(form.wrapped),
        ranks=dict(Counter(module.rank for module in form.wrapped)),
        saved=tuple(replacement.weight for replacement in form.replacements),
        unchanged=work.unchanged,
        size_bytes=size,
        compressions=tuple(work.compressions),
        findings=tuple(_losses(finetuned.path.name, work.compressions)),
    )


def _refuse_no_matrix(work: "_Extraction", base: Checkpoint, finetuned: Checkpoint) -> None:
    if not work.compressions:
        relation = "differs only in norms and biases from" if work.deltas else "has the same weights as"
        message = f"{finetuned.path.name} {relation} {base.path.name}: no matrix has changed."
        raise Mismatch("nothing_to_extract", message, subject=finetuned.path.name)


def _losses(name: str, compressions: Sequence[Compression]) -> list[Finding]:
    """A warning if the cut to a rank lost much of what fine-tuning changed."""
    lost = total_loss(compressions)
    if lost <= MUCH_LOST:
        return []
    worst = max(compressions, key=lambda one: one.relative)
    message = (
        f"The adapter misses {lost:.0%} of what {name} changed (|Δ - Δ'| / |Δ|), and {worst.relative:.0%} at "
        f"{worst.module}. Give a higher rank, or energy=0.99; what rounding to 16 bits changed has no low rank."
    )
    return [Finding("much_lost", Severity.WARNING, name, message, lost)]


@dataclass(frozen=True, slots=True)
class _Slot:
    """The module that owns a stored tensor. `layout` is None unless it is the weight of a linear layer or an embedding;
    `module` is empty for a tensor that shares its parameter with others, such as one expert of a stack. `theirs` is the
    tensor's name in the fine-tuned checkpoint, empty for one that a loader does not read."""

    module: str
    layout: Layout | None
    theirs: str
    tied: bool = False


class _Extraction:
    """The deltas and losses so far. Factors are kept on disk."""

    def __init__(
        self, base: Checkpoint, finetuned: Checkpoint, kept: tuple[int | None, float | None], device: torch.device
    ) -> None:
        self._base, self._finetuned, self._kept, self._device = base, finetuned, kept, device
        self._spill, self._mapped = SpillFile(), cache(MappedFile.open)
        self.deltas: list[Delta] = []
        self.compressions: list[Compression] = []
        self.unchanged = 0

    def take(self, name: str, slot: _Slot) -> None:
        """Compares one tensor, and adds its delta if it changed. Raises NotSupported for one that no adapter holds."""
        (shard, entry), (other_shard, other) = self._base.locate(name), self._finetuned.locate(slot.theirs)
        files = self._mapped(local_file(shard).path), self._mapped(local_file(other_shard).path)
        W, changed = files[0].tensor(entry), files[1].tensor(other)
        if _same(name, W, changed, files):
            self.unchanged += 1
        elif slot.layout is not None:
            self._add_pair(name, slot, slot.layout, (files[0].factor(entry), files[1].factor(other)))
        elif slot.module:
            self._save(name, slot)
        else:
            raise NotSupported(
                "not_extractable",
                f"{name} changed, and a LoRA can hold it neither as a pair nor in full.",
                subject=name,
            )

    def complete(self, slots: Mapping[str, _Slot]) -> list[Delta]:
        """The deltas, with the unchanged parameters of modules whose weight is saved: PEFT loads such a module only in
        full."""
        held = {delta.weight: delta.module for delta in self.deltas if isinstance(delta, Replacement)}
        full = {module for name, module in held.items() if name.endswith(".weight")}
        for name, slot in slots.items():
            if slot.module in full and name not in held:
                self._save(name, slot)
        return self.deltas

    def _save(self, name: str, slot: _Slot) -> None:
        shard, entry = self._finetuned.locate(slot.theirs)
        tensor = self._mapped(local_file(shard).path).tensor(entry).to(torch.float32, copy=True)
        self.deltas.append(Replacement(module=slot.module, weight=name, tensor=tensor))

    def _add_pair(self, name: str, slot: _Slot, layout: Layout, both: tuple[Factor, Factor]) -> None:
        shape = (both[0].shape[0], both[0].shape[1])
        matrix = Matrix(shape, lambda first, last: self._rows(both[1], first, last) - self._rows(both[0], first, last))
        (left, right), loss = compress_dense(slot.module, matrix, *self._kept, self._device)
        A, B = (right, left) if layout is Layout.LINEAR else (left.T, right.T)
        delta = LowRank(module=slot.module, weight=name, layout=layout, A=A, B=B, scale=1.0, tied=slot.tied)
        (delta,) = spilled(self._spill, [delta])
        self.compressions.append(loss)
        if slot.tied:
            delta = replace(delta, twin=True)
            self.deltas.append(pair_for_head(delta, TIED_HEAD))
        self.deltas.append(delta)

    def _rows(self, factor: Factor, first: int, last: int) -> torch.Tensor:
        """Rows of a weight in float32 on the device, read without keeping pages of its file."""
        rows_BN = torch.empty(last - first, factor.shape[1])
        read_into(rows_BN, factor[first:last])
        return rows_BN.to(self._device)


def _same(name: str, W: torch.Tensor, changed: torch.Tensor, files: tuple[MappedFile, MappedFile]) -> bool:
    """Whether the values are equal, whatever the dtypes. Compares part by part and drops the pages read: an embedding
    may have a billion values. Raises InvalidFile for one that is not finite."""
    same = True
    parts = zip(W.flatten().split(_CHECKED_TOGETHER), changed.flatten().split(_CHECKED_TOGETHER), strict=True)
    for ours, theirs in parts:
        _refuse_not_finite(theirs, name, "the fine-tuned checkpoint", "Use an earlier checkpoint of the run.")
        _refuse_not_finite(ours, name, "the base", "Download the base again.")
        alike = (ours, theirs) if ours.dtype == theirs.dtype else (ours.float(), theirs.float())
        same = same and torch.equal(*alike)
        for file in files:
            file.drop_pages()
    return same


def _refuse_not_finite(values: torch.Tensor, name: str, owner: str, next_step: str) -> None:
    if not bool(torch.isfinite(values).all()):
        message = f"{name} of {owner} has a NaN or an infinite value."
        raise InvalidFile("not_finite", message, subject=name, next_step=next_step)


def _slots(base: Checkpoint, finetuned: Checkpoint) -> dict[str, _Slot]:
    """Every stored tensor of the base with its owner. Only its code defines the names and classes of modules. The
    two checkpoints may have different names for one parameter, as GPT-2's have with and without `transformer.`. Raises
    Mismatch unless both have the same parameters, of the same shapes."""
    model = _skeleton(base)
    ours, theirs = base.architecture, finetuned.architecture
    unread = _unread(base, model)
    slots = {name: _Slot("", None, "" if unread(name) else name) for name in ours.tensors}
    for path, module in model.named_modules():
        for parameter in module._parameters:
            target, other = (find_weight(path, parameter, checkpoint) for checkpoint in (ours, theirs))
            if not isinstance(target, Target) or (ours.tied and is_head(path)):
                continue
            layout = _layout(module) if parameter == "weight" else None
            own = path if layout or target.weight.endswith(f".{parameter}") else ""
            name = other.weight if isinstance(other, Target) else target.weight
            slots[target.weight] = _Slot(own, layout, name, target.tied)
    _refuse_unlike(base, finetuned, slots, _unread(finetuned, model))
    return slots


def _unread(checkpoint: Checkpoint, model: nn.Module) -> Callable[[str], bool]:
    """Whether loading the model skips a tensor that belongs to none of its parameters: a mask that old versions stored,
    or the copy of a tied head."""
    masks = cast("Iterable[str]", getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    patterns = [re.compile(mask) for mask in (*masks, *_NEVER_READ)]
    copies = head_tensors(checkpoint.architecture.tensors) if checkpoint.architecture.tied else []
    return lambda name: name in copies or any(pattern.search(name) for pattern in patterns)


def _skeleton(base: Checkpoint) -> nn.Module:
    """The model without weights."""
    from transformers.models.auto.configuration_auto import AutoConfig
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    refuse_larger_than_its_tensors(base)
    try:
        config = AutoConfig.from_pretrained(base.path, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"), modules_bounded(base):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise InvalidFile(
            "model_not_loadable",
            f"{base.path}: transformers cannot build it: {error}",
            subject=str(base.path),
            next_step="Extraction needs a causal language model that transformers knows.",
        ) from error


def _layout(module: nn.Module) -> Layout | None:
    if type(module).__name__ == "Conv1D":
        return Layout.CONV1D
    if isinstance(module, nn.Embedding):
        return Layout.EMBEDDING
    return Layout.LINEAR if isinstance(module, nn.Linear) else None


def _refuse_unlike(
    base: Checkpoint, finetuned: Checkpoint, slots: Mapping[str, _Slot], unread: Callable[[str], bool]
) -> None:
    """Raises Mismatch unless both have the same tensors, of the same shapes."""
    ours, theirs = base.architecture.tensors, finetuned.architecture.tensors
    pairs = {name: slot.theirs for name, slot in slots.items() if slot.theirs}
    pairs |= {name: name for name in theirs.keys() - set(pairs.values()) if not unread(name)}
    for name, other in sorted(pairs.items()):
        if name in ours and other in theirs and ours[name].shape == theirs[other].shape:
            continue
        both = name in ours and other in theirs
        grown = both and len(ours[name].shape) == 2 and ours[name].shape[1:] == theirs[other].shape[1:]
        here = shape_text(ours[name].shape) if name in ours else "missing"
        there = shape_text(theirs[other].shape) if other in theirs else "missing"
        raise Mismatch(
            "architecture_differs",
            f"{name} is {here} in {base.path.name} and {there} in {finetuned.path.name}.",
            subject=name,
            next_step="A grown vocabulary cannot be extracted: use the checkpoint itself."
            if grown
            else "Name the checkpoint that it was fine-tuned from.",
        )
