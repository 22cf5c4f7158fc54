"""An adapter's tensors and facts -> what it adds to each weight. What is no plain low-rank sum is refused by name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import overload

import torch

from composer.delta import Delta, Layout, LowRank, Replacement
from composer.errors import InvalidFile, Mismatch, NotSupported
from composer.findings import Finding, Severity
from composer.formats.checkpoint import Architecture
from composer.formats.config import AdapterConfig
from composer.formats.facts import Adapter, read_adapter
from composer.formats.placement import LOW_RANK_KINDS, Placed, PlacedModule, place
from composer.tensors import all_finite, map_tensor, torch_threads

MERGE_NEXT = "Store and serve it as it is, or train a plain LoRA."


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """An adapter ready for arithmetic. Factors and replacements keep their dtype, mapped from the file: whoever
    computes with them takes them to float32 or float64 first, and only memory that is looked at is used.

    `base_copies` maps a checkpoint tensor to PEFT's copy of it: a merge compares the two.
    """

    name: str
    path: Path
    config: AdapterConfig
    placed: Placed
    deltas: Sequence[Delta]
    base_copies: Mapping[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])


class StoredDeltas(Sequence[Delta]):
    """The deltas of an adapter, each mapped from the file whenever it is asked for: who looks at one after the other
    holds one, however large the adapter is and however many there are."""

    def __init__(self, adapter: Adapter, modules: Sequence[PlacedModule]) -> None:
        self._adapter, self._modules = adapter, modules

    def __len__(self) -> int:
        return len(self._modules)

    @overload
    def __getitem__(self, index: int) -> Delta: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Delta, ...]: ...
    def __getitem__(self, index: int | slice) -> Delta | tuple[Delta, ...]:
        if isinstance(index, slice):
            return tuple(_delta(self._adapter, module) for module in self._modules[index])
        return _delta(self._adapter, self._modules[index])


def load_deltas(path: Path, architecture: Architecture | None) -> LoadedAdapter:
    """Load the adapter in directory `path`, placed on a base (or only on its own names, without one).

    Raises Mismatch when a tensor does not fit the base, NotSupported for a variant that is no plain low-rank sum (DoRA,
    PiSSA, …), InvalidFile for a factor that is not finite, and what `read_adapter` raises.
    """
    adapter = read_adapter(path)
    reason = adapter.config.unsupported()
    if reason is not None:
        code = adapter.config.variant
        raise NotSupported(
            f"variant_{code}", f"{adapter.name} cannot be merged: {reason}.", subject=adapter.name, next_step=MERGE_NEXT
        )
    placed = place(adapter.config, adapter.header, architecture, adapter.name)
    refuse_errors(adapter.name, placed.findings)
    _refuse_parts(adapter, placed)
    deltas = StoredDeltas(adapter, [module for module in placed.modules if module.kind != "base_copy"])
    with torch_threads(1):  # small tensors, looked at one by one: more threads would only wait for each other
        for delta in deltas:
            _refuse_not_finite(adapter.name, delta)
    copies = {module.weight: _whole(adapter, module) for module in placed.modules if module.kind == "base_copy"}
    return LoadedAdapter(adapter.name, path, adapter.config, placed, deltas, copies)


def refuse_errors(subject: str, findings: list[Finding]) -> None:
    """Raise Mismatch for the first error among the findings, with the number of others."""
    errors = [finding for finding in findings if finding.severity is Severity.ERROR]
    if errors:
        more = f" ({len(errors) - 1} more)" if len(errors) > 1 else ""
        raise Mismatch(errors[0].code, f"{subject}: {errors[0].message}{more}", subject=errors[0].subject)


def _refuse_parts(adapter: Adapter, placed: Placed) -> None:
    """The tensors decide, not only the config's flags: a magnitude without `use_dora` is DoRA all the same."""
    for module in placed.low_rank:
        extra = sorted(set(module.parts) - {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"})
        if extra:
            message = f"{adapter.name} cannot be merged: {module.module} has a {extra[0]}."
            raise NotSupported(f"part_{extra[0]}", message, subject=module.module, next_step=MERGE_NEXT)


def _delta(adapter: Adapter, module: PlacedModule) -> Delta:
    if module.kind not in LOW_RANK_KINDS:
        return Replacement(module.module, module.weight, _whole(adapter, module), module.tied)
    prefix = "lora_embedding_" if module.kind == "embedding" else "lora_"
    A_RI, B_OR = (
        map_tensor(adapter.weights_path, adapter.header.tensors[module.parts[f"{prefix}{part}"]]) for part in "AB"
    )
    return LowRank(module.module, module.weight, Layout(module.kind), A_RI, B_OR, module.scale, module.tied)


def _refuse_not_finite(name: str, delta: Delta) -> None:
    if isinstance(delta, LowRank) and not (all_finite(delta.A_RI) and all_finite(delta.B_OR)):
        message = f"{name} has a NaN or an infinite value in {delta.module}."
        raise InvalidFile(
            "not_finite", message, subject=delta.module, next_step="Train again, or take an earlier save."
        )


def _whole(adapter: Adapter, module: PlacedModule) -> torch.Tensor:
    (key,) = module.parts.values()
    return map_tensor(adapter.weights_path, adapter.header.tensors[key])
