"""The two sides of a tied weight: if an adapter changes both alike, each is the other's twin."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from composer.deltas.stored import MappedFile
from composer.deltas.variants import lora
from composer.deltas.variants.source import ModuleParts
from composer.errors import Mismatch
from composer.formats.adapters.facts import Adapter
from composer.formats.adapters.placement.naming import is_embedding, is_head
from composer.formats.adapters.placement.pairs import FACTOR_PARTS
from composer.formats.adapters.placement.result import PlacedModule, PlacementResult


def mark_tied_pairs(adapter: Adapter, file: MappedFile, placed: PlacementResult, *, on_a_base: bool) -> PlacementResult:
    """The modules with twins marked: full tensors and token rows that are saved for both sides and equal, and pairs
    that PEFT ties (`ensure_weight_tying`). Without a base, such pairs count as tied if they are equal. Raises Mismatch
    for pairs of a tied weight that should be equal but differ."""
    saved = (*_saved(adapter, file, placed, "replacement"), *_saved(adapter, file, placed, "tokens"))
    twins = (*saved, *_pairs(adapter, file, placed, on_a_base=on_a_base))
    modules = [
        replace(module, weight=twins[0].weight, tied=True, twin=True) if module in twins else module
        for module in placed.modules
    ]
    return PlacementResult(modules, placed.findings)


def _saved(adapter: Adapter, file: MappedFile, placed: PlacementResult, kind: str) -> Sequence[PlacedModule]:
    sides = _sides(module for module in placed.modules if module.kind == kind and module.tied and not module.twin)
    tensors = [[ModuleParts(adapter, file, side)[part] for part in side.parts] for side in sides]
    return sides if sides and _equal(*tensors) else ()


def _pairs(adapter: Adapter, file: MappedFile, placed: PlacementResult, *, on_a_base: bool) -> Sequence[PlacedModule]:
    said = bool(adapter.config.raw.get("ensure_weight_tying"))
    sides = _sides(module for module in placed.low_rank if said and (module.tied or not on_a_base))
    if not sides:
        return ()
    embedding, head = sides
    A_RI, B_OR = lora.factors(ModuleParts(adapter, file, embedding))
    if _equal((B_OR.T, A_RI.T), lora.factors(ModuleParts(adapter, file, head))):
        # Each side has its own magnitude, and its own scale if a pattern names one of them.
        plain = embedding.parts.keys() | head.parts.keys() <= FACTOR_PARTS and embedding.scale == head.scale
        return sides if plain else ()
    if not on_a_base:
        return ()
    message = f"{adapter.name} says that {head.module} and its twin are tied, but their factors differ."
    raise Mismatch("twins_differ", message, subject=head.module)


def _sides(modules: Iterable[PlacedModule]) -> tuple[PlacedModule, ...]:
    """(embedding, head) if there is exactly one of each; otherwise empty."""
    both = list(modules)
    embeddings, heads = ([delta for delta in both if side(delta.module)] for side in (is_embedding, is_head))
    return (embeddings[0], heads[0]) if len(embeddings) == len(heads) == 1 else ()


def _equal(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one, other, strict=True))
