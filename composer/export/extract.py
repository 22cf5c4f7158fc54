"""Extracts a LoRA from a fine-tuned checkpoint: what it adds to its base, each matrix cut to a rank.

Shapes: M x N a weight as stored, O outputs and I inputs of its module, R rank.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from composer.deltas.delta import Delta, Layout, LowRank, Replacement, spilled
from composer.deltas.stored import MappedFile, SpillFile
from composer.deltas.tensors import torch_device
from composer.errors import InvalidFile, Mismatch, NotSupported
from composer.export.peft import peft_form, write_adapter
from composer.findings import Finding, Severity
from composer.formats.adapters.placement.naming import TIED_HEAD, Target, find_weight, is_head
from composer.formats.adapters.placement.result import CONV1D_MODELS, shape_text
from composer.formats.checkpoints.checkpoint import Checkpoint
from composer.formats.checkpoints.hashing import architecture_digest, identities
from composer.formats.checkpoints.staging import refuse_existing
from composer.methods.matrix import Matrix
from composer.methods.spectral import Compression, compress_dense, total_loss
from composer.methods.tied import pair_for_head

USUAL_RANK = 32
"""The rank if neither a rank nor a share of the energy is given."""
MUCH_LOST = 0.3
"""A relative error above this is a warning."""
_CHECKED_TOGETHER = 1 << 22  # values


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
        rows = [asdict(one) | {"relative": one.relative} for one in self.compressions]
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
    """Writes what `finetuned` adds to `base` as one PEFT adapter in float32, with s = 1.

    The weight of each linear layer and embedding becomes a pair of at most `rank` directions, or as many as hold the
    share `energy` of |Δ|² (USUAL_RANK if neither is given). Norms and biases that changed are saved in full. One matrix
    at a time is in memory, and decomposed on `device` (auto, cpu or cuda:N). `progress` gets the bytes of the base just
    compared.

    Raises RefusedOutput for an existing `out_dir`, before anything is read; Mismatch for checkpoints of different
    architectures and for equal ones; InvalidFile for a value that is not finite; NotSupported for a changed tensor that
    no adapter can hold; and what `write_adapter` raises.
    """
    refuse_existing(out_dir)
    _refuse_unlike(base, finetuned)
    if rank is None and energy is None:
        rank = USUAL_RANK
    files = [one.path / shard for one in (base, finetuned) for shard in one.shards]
    inputs = identities([*files, *(one.path / "config.json" for one in (base, finetuned))])
    work = _Extraction(base, finetuned, (rank, energy), torch_device(device))
    for name, slot in _slots(base).items():
        work.take(name, slot)
        progress(base.architecture.tensors[name].size_bytes)
    if not work.compressions:
        relation = "differs only in norms and biases from" if work.deltas else "has the same weights as"
        message = f"{finetuned.path.name} {relation} {base.path.name}: no matrix has changed."
        raise Mismatch("nothing_to_extract", message, subject=finetuned.path.name, next_step="Name the fine-tuned one.")
    form = peft_form(work.deltas)
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
    size = write_adapter(form, out_dir, fields, note, inputs)
    return ExtractReport(
        out_dir=str(out_dir),
        modules=len(form.wrapped),
        ranks=dict(Counter(one.rank for one in form.wrapped)),
        saved=tuple(one.weight for one in form.replacements),
        unchanged=work.unchanged,
        size_bytes=size,
        compressions=tuple(work.compressions),
        findings=tuple(_losses(finetuned.path.name, work.compressions)),
    )


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
    `module` is empty for a tensor that shares its parameter with others, such as one expert of a stack."""

    module: str
    layout: Layout | None
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
        (shard, entry), (other_shard, other) = self._base.locate(name), self._finetuned.locate(name)
        files = self._mapped(shard), self._mapped(other_shard)
        self._compare(name, slot, files[0].tensor(entry), files[1].tensor(other))
        for file in files:
            file.drop_pages()

    def _compare(self, name: str, slot: _Slot, W: torch.Tensor, changed: torch.Tensor) -> None:
        _refuse_not_finite(changed, name, "the fine-tuned checkpoint", "Use an earlier checkpoint of the run.")
        _refuse_not_finite(W, name, "the base", "Download the base again.")
        if _same(W, changed):
            self.unchanged += 1
        elif slot.layout is not None:
            self._add_pair(name, slot, slot.layout, W, changed)
        elif slot.module and name.startswith(f"{slot.module}."):
            tensor = changed.to(torch.float32, copy=True)
            self.deltas.append(Replacement(module=slot.module, weight=name, tensor=tensor))
        else:
            raise NotSupported(
                "not_extractable",
                f"{name} changed, and a LoRA can hold it neither as a pair nor in full.",
                subject=name,
                next_step="Use the fine-tuned checkpoint itself: push it with --kind model.",
            )

    def _add_pair(self, name: str, slot: _Slot, layout: Layout, W: torch.Tensor, changed: torch.Tensor) -> None:
        (rows, columns), blocks = W.shape, _difference(W, changed, self._device)
        (left, right), loss = compress_dense(slot.module, Matrix((rows, columns), blocks), *self._kept, self._device)
        A, B = (right, left) if layout is Layout.LINEAR else (left.T, right.T)
        delta = LowRank(module=slot.module, weight=name, layout=layout, A=A, B=B, scale=1.0, tied=slot.tied)
        (delta,) = spilled(self._spill, [delta])
        self.compressions.append(loss)
        if slot.tied:
            delta = replace(delta, twin=True)
            self.deltas.append(pair_for_head(delta, TIED_HEAD))
        self.deltas.append(delta)


def _refuse_not_finite(values: torch.Tensor, name: str, owner: str, next_step: str) -> None:
    # In parts, whose intermediate results are small: an embedding may have a billion values.
    if not all(bool(torch.isfinite(part).all()) for part in values.flatten().split(_CHECKED_TOGETHER)):
        message = f"{name} of {owner} has a NaN or an infinite value."
        raise InvalidFile("not_finite", message, subject=name, next_step=next_step)


def _same(W: torch.Tensor, changed: torch.Tensor) -> bool:
    """Whether the values are equal, whatever the dtypes."""
    return torch.equal(W, changed) if W.dtype == changed.dtype else torch.equal(W.float(), changed.float())


def _difference(
    W_MN: torch.Tensor, changed_MN: torch.Tensor, device: torch.device
) -> Callable[[int, int], torch.Tensor]:
    return lambda first, last: changed_MN[first:last].to(device).float() - W_MN[first:last].to(device).float()


def _slots(base: Checkpoint) -> dict[str, _Slot]:
    """Every stored tensor with its owner. What a module is called, and its class, only its code knows: the model is
    built without weights."""
    architecture = base.architecture
    slots = {name: _Slot("", None) for name in architecture.tensors}
    for path, module in _skeleton(base).named_modules():
        for parameter in module._parameters:
            target = find_weight(path, parameter, architecture)
            if not isinstance(target, Target) or (architecture.tied and is_head(path)):
                continue
            layout = _layout(module) if parameter == "weight" else None
            slots[target.weight] = _Slot(path, layout, target.tied)
    return slots


def _skeleton(base: Checkpoint) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(base.path, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
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


def _refuse_unlike(base: Checkpoint, finetuned: Checkpoint) -> None:
    """Raises Mismatch unless both have the same tensors, of the same shapes."""
    ours, theirs = base.architecture.tensors, finetuned.architecture.tensors
    for name in sorted(ours.keys() | theirs.keys()):
        if name in ours and name in theirs and ours[name].shape == theirs[name].shape:
            continue
        both = name in ours and name in theirs
        grown = both and len(ours[name].shape) == 2 and ours[name].shape[1:] == theirs[name].shape[1:]
        here = shape_text(ours[name].shape) if name in ours else "missing"
        there = shape_text(theirs[name].shape) if name in theirs else "missing"
        raise Mismatch(
            "architecture_differs",
            f"{name} is {here} in {base.path.name} and {there} in {finetuned.path.name}.",
            subject=name,
            next_step="A grown vocabulary cannot be extracted: use the checkpoint itself."
            if grown
            else "Name the checkpoint that it was fine-tuned from.",
        )
