"""Loads an adapter's tensors as deltas of the base's weights. Variants that no delta can express are refused by name.

Each variant has a function from a placed module to its deltas, in one file per family in this folder.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import overload

import torch

from composer.deltas.delta import Delta, LowRank, Replacement, spilled
from composer.deltas.stored import MappedFile, SpillFile
from composer.deltas.tensors import all_finite, torch_threads
from composer.deltas.variants import lora, products, rescaled, rotations, shared, spectral
from composer.deltas.variants.source import ModuleParts, Read
from composer.deltas.variants.tied import mark_tied_pairs
from composer.errors import InvalidFile, NotSupported
from composer.findings import refuse_errors
from composer.formats.adapters.config.config import AdapterConfig
from composer.formats.adapters.facts import Adapter, read_adapter
from composer.formats.adapters.placement.placement import place
from composer.formats.adapters.placement.result import PlacedModule, PlacementResult
from composer.formats.checkpoints.checkpoint import Architecture

_KINDS: dict[str, Read] = {
    "linear": lora.pair,
    "conv1d": lora.pair,
    "embedding": lora.pair,
    "convolution": lora.pair,
    "block_diagonal": lora.block_diagonal,
    "experts": lora.experts,
    "tokens": lora.tokens,
    "kasa": rescaled.kasa,
}
READERS: dict[str, Read] = {
    **products.READERS, **rescaled.READERS, **rotations.READERS, **shared.READERS, **spectral.READERS,
}  # fmt: skip
"""The types of composer/formats/adapters/config/types.py, and the functions that make their deltas."""
NAME_BASE = "Name the base that it was trained on: --base."


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedAdapter:
    """An adapter ready for arithmetic. Factors and replacements keep their dtype and, if the file has them directly,
    are mapped from it, so that only memory that is read is used. Convert them to float32 or float64 before computing.

    `base_copies` maps a checkpoint tensor to PEFT's copy of it; a merge compares the two.
    """

    name: str
    path: Path
    config: AdapterConfig
    placed: PlacementResult
    deltas: Sequence[Delta]
    base_copies: Mapping[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])


class StoredDeltas(Sequence[Delta]):
    """The deltas of an adapter, made from the file on demand: a caller that reads them in order holds one module's
    deltas, however large the adapter is. Factors that are not directly in the file (VeRA, MiSS, …) are made once and
    spilled to disk."""

    def __init__(self, adapter: Adapter, file: MappedFile, modules: Sequence[PlacedModule]) -> None:
        self._adapter, self._file, self._spill = adapter, file, SpillFile()
        self._latest: tuple[PlacedModule, list[Delta]] | None = None
        self._made: dict[int, list[Delta]] = {}
        self._making = Lock()
        self._slots = [(module, index) for module in modules for index in range(_count(adapter, module))]

    def __len__(self) -> int:
        return len(self._slots)

    @overload
    def __getitem__(self, index: int) -> Delta: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Delta, ...]: ...
    def __getitem__(self, index: int | slice) -> Delta | tuple[Delta, ...]:
        if isinstance(index, slice):
            return tuple(self._delta(*slot) for slot in self._slots[index])
        return self._delta(*self._slots[index])

    def _delta(self, module: PlacedModule, index: int) -> Delta:
        latest = self._latest
        if latest is None or latest[0] is not module:
            self._latest = latest = (module, self._deltas(module))
        return latest[1][index]

    def _deltas(self, module: PlacedModule) -> list[Delta]:
        with self._making:
            if id(module) in self._made:
                return self._made[id(module)]
            deltas = _read(ModuleParts(self._adapter, self._file, module))
            if len(deltas) != _count(self._adapter, module):
                raise RuntimeError(
                    f"the reader of {module.module} makes {len(deltas)} deltas: add up those of one weight"
                )
            fresh = [delta for delta in deltas if isinstance(delta, LowRank) and not delta.stored]
            if not fresh:
                return deltas
            put = dict(zip(map(id, fresh), spilled(self._spill, fresh), strict=True))
            self._made[id(module)] = [put.get(id(delta), delta) for delta in deltas]
            return self._made[id(module)]


def load_deltas(path: Path, architecture: Architecture | None) -> LoadedAdapter:
    """Loads the adapter in directory `path` and places it on a base (or, without one, on its own names).

    Raises Mismatch if a tensor does not fit the base; NotSupported for variants that no delta of the base's weights can
    express (PiSSA, activated LoRA, prompts, …) or, without a base, whose size only the base has (VeRA, OFT, …);
    InvalidFile for a value that is not finite; and what `read_adapter` raises.
    """
    adapter = read_adapter(path)
    placed = place_or_refuse(adapter, architecture, "merged")
    _refuse_unsized(adapter, placed)
    file = MappedFile.open(adapter.weights_path)
    with torch_threads(1):  # small tensors, read one by one: more threads would only wait for each other
        for module in placed.adapted:
            parts = ModuleParts(adapter, file, module)
            if not all(all_finite(parts[part]) for part in module.parts):
                message = f"{adapter.name} has a NaN or an infinite value in {module.module}."
                next_step = "Train again, or use an earlier checkpoint."
                raise InvalidFile("not_finite", message, subject=module.module, next_step=next_step)
    placed = mark_tied_pairs(adapter, file, placed, on_a_base=architecture is not None)
    copies = {copy.weight: ModuleParts(adapter, file, copy).only for copy in placed.modules if copy.kind == "base_copy"}
    deltas = StoredDeltas(adapter, file, [module for module in placed.modules if module.kind != "base_copy"])
    return LoadedAdapter(
        name=adapter.name, path=path, config=adapter.config, placed=placed, deltas=deltas, base_copies=copies
    )


def place_or_refuse(adapter: Adapter, architecture: Architecture | None, done: str) -> PlacementResult:
    """Places an adapter that is about to be `done` (merged, …). Raises NotSupported for variants that no delta of the
    base's weights can express, and Mismatch if a tensor does not fit the base."""
    if (refusal := adapter.config.unsupported()) is not None:
        message = f"{adapter.name} cannot be {done}: {refusal.reason}."
        code = f"variant_{adapter.config.variant[:40]}"
        raise NotSupported(code, message, subject=adapter.name, next_step=refusal.way_out)
    placed = place(adapter.config, adapter.header, architecture, adapter.name)
    refuse_errors(adapter.name, placed.findings)
    return placed


def _refuse_unsized(adapter: Adapter, placed: PlacementResult) -> None:
    """Refuses types whose file lacks one dimension of the weight, without which there is no delta."""
    for module in placed.modules:
        if module.kind == "other" and (0 in module.shape or not module.shape):
            message = (
                f"A {adapter.config.peft_type} file does not contain the size of {module.module}; only its base does."
            )
            raise NotSupported("needs_base", message, subject=module.module, next_step=NAME_BASE)


def _count(adapter: Adapter, module: PlacedModule) -> int:
    """The number of the module's deltas, without reading it."""
    if module.kind == "experts":
        return len(module.pieces)
    empty = module.kind == "other" and any(0 in adapter.header.tensors[key].shape for key in module.parts.values())
    return 0 if empty else 1


def _read(module: ModuleParts) -> list[Delta]:
    placed = module.placed
    if placed.kind != "replacement":
        return _reader(module.config, placed)(module)
    return [
        Replacement(module=placed.module, weight=placed.weight, tensor=module.only, tied=placed.tied, twin=placed.twin)
    ]


def _reader(config: AdapterConfig, module: PlacedModule) -> Read:
    if config.peft_type == "LORA" and module.kind == "bias":
        return lora.bias
    if module.kind in _KINDS:
        return rescaled.dora if "magnitude" in module.parts else _KINDS[module.kind]
    return READERS[config.peft_type]
