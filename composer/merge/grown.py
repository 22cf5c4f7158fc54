"""Vocabularies grown by an adapter, whose file holds all rows of the tensors with one row per token.

Shapes: V rows of the base's vocabulary, D columns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from composer.deltas.delta import Delta, Replacement, RowwiseDelta
from composer.deltas.stored import SpillFile, stored_tensor
from composer.deltas.variants.load import LoadedAdapter
from composer.errors import Mismatch
from composer.formats.adapters.facts import Adapter, read_adapter
from composer.formats.adapters.placement.naming import TOKENS, Target, find_weight, is_vocabulary, split_key
from composer.formats.checkpoints.checkpoint import Architecture, Checkpoint
from composer.formats.checkpoints.header import FLOAT_DTYPES
from composer.formats.checkpoints.tying import embedding_tensors, head_tensors

_BLOCK_ROWS = 4096


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The vocabulary after merging. `architecture` is the base's, with `rows` rows in each of `tensors`; 0 and none if
    nothing grows. `grown_by` is the directory of the adapter with the new rows."""

    architecture: Architecture
    rows: int = 0
    tensors: tuple[str, ...] = ()
    grown_by: Path | None = None


def grown_vocabulary(checkpoint: Checkpoint, paths: Sequence[Path]) -> Vocabulary:
    """The base's vocabulary, or a larger one if adapters hold all of its rows. For an adapter that lacks rows, nothing
    grows; its placement on the base reports what does not fit."""
    base = checkpoint.architecture
    tensors = _vocabulary_tensors(base)
    if not tensors or checkpoint.own_head is not None:
        return Vocabulary(base)
    held = {path: rows for path in paths if (rows := _rows_held(read_adapter(path), base))}
    sizes = {rows.get(name, 0) for rows in held.values() for name in tensors}
    if len(sizes) != 1 or 0 in sizes:
        return Vocabulary(base)
    (rows,) = sizes
    larger = {name: replace(base.tensors[name], shape=(rows, *base.tensors[name].shape[1:])) for name in tensors}
    architecture = replace(base, tensors={**base.tensors, **larger})
    return Vocabulary(architecture, rows, tensors, next(iter(held)))


def _vocabulary_tensors(base: Architecture) -> tuple[str, ...]:
    """Input embedding and head. Empty if other tensors have a row per token too, such as a bias of the head."""
    embeddings = embedding_tensors(base.tensors)
    tensors = (*embeddings, *(() if base.tied else head_tensors(base.tensors)))
    if len(embeddings) != 1 or any(base.tensors[name].dtype not in FLOAT_DTYPES for name in tensors):
        return ()
    rows = base.tensors[embeddings[0]].shape[:1]
    known = {*tensors, *head_tensors(base.tensors)}
    others = (name for name in base.tensors.keys() - known if not any(part.isdecimal() for part in name.split(".")))
    same = all(base.tensors[name].shape[:1] == rows for name in tensors)
    return tensors if same and not any(base.tensors[name].shape[:1] == rows for name in others) else ()


def _rows_held(adapter: Adapter, base: Architecture) -> dict[str, int]:
    """Tensor -> its rows, if the file has more rows than the base, including every new one."""
    counts: dict[str, int] = {}
    for key, entry in adapter.header.tensors.items():
        split = split_key(key)
        target = find_weight(split.module, "weight", base) if is_vocabulary(split.module) else None
        if not isinstance(target, Target) or split.part not in ("weight", TOKENS):
            continue
        count = base.tensors[target.weight].shape[0]
        rows = entry.spec.shape[0] if split.part == "weight" and entry.spec.shape else 0
        if split.part == TOKENS:
            new = sorted(row for row in adapter.config.tokens_of(split.module) if row >= count)
            rows = count + len(new) if new == list(range(count, count + len(new))) else 0
        if rows > count:
            counts[target.weight] = rows
    return counts


def with_new_rows(checkpoint: Checkpoint, adapter: LoadedAdapter, vocabulary: Vocabulary) -> LoadedAdapter:
    """The adapter with trained rows of new tokens turned into the complete grown tensor."""
    made: dict[str, torch.Tensor] = {}
    deltas: list[Delta] = []
    for delta in adapter.deltas:
        count = checkpoint.architecture.tensors[delta.weight].shape[0] if delta.weight in vocabulary.tensors else 0
        if not (count and isinstance(delta, RowwiseDelta) and delta.sets_rows >= set(range(count, vocabulary.rows))):
            deltas.append(delta)
            continue
        if delta.weight not in made:
            made[delta.weight] = _extended(stored_tensor(*checkpoint.locate(delta.weight)), delta, vocabulary.rows)
        deltas.append(
            Replacement(
                module=delta.module, weight=delta.weight, tensor=made[delta.weight], tied=delta.tied, twin=delta.twin
            )
        )
    return replace(adapter, deltas=tuple(deltas)) if made else adapter


def _extended(base_VD: torch.Tensor, delta: RowwiseDelta, rows: int) -> torch.Tensor:
    """The extended tensor in at least float32, so that trained values are rounded only once, when written."""
    tensor = torch.zeros(rows, base_VD.shape[1], dtype=torch.promote_types(base_VD.dtype, torch.float32))
    tensor[: len(base_VD)] = base_VD
    for begin in range(0, rows, _BLOCK_ROWS):
        block = tensor[begin : begin + _BLOCK_ROWS]
        block += delta.rows(block, begin)
    return SpillFile().put([tensor])[0].tensor


def refuse_uneven(vocabulary: Vocabulary, deltas: Mapping[str, Sequence[Delta]], head: str | None) -> None:
    """Raises Mismatch unless each tensor of the vocabulary gets all of its rows: an adapter may have weight 0, a rule
    may leave a side out, or differences may replace full tensors."""
    names = {*vocabulary.tensors, *([head] if head else [])} if vocabulary.rows else set[str]()
    for name in sorted(names):
        full = [delta for delta in deltas.get(name, ()) if isinstance(delta, Replacement)]
        if len(full) != 1 or len(deltas[name]) != 1 or len(full[0].tensor) != vocabulary.rows:
            message = f"The vocabulary grows to {vocabulary.rows} rows, and {name} does not get all of them."
            next_step = "Give the adapter that holds them a weight of 1, without rules or replacements=delta for them."
            raise Mismatch("vocabulary_mismatch", message, subject=name, next_step=next_step)
