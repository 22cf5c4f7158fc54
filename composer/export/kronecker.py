"""Converts LyCORIS's LoKr to PEFT's: the same products, in the only shapes that PEFT loads for one config.

A module adds s w1 ⊗ w2, where each side is a full matrix or a product `_a _b` of rank R (arXiv 2309.14859). s is
alpha / R, or 1 if both are full. PEFT always multiplies by alpha / r, so s goes into w2, and alpha is set to r.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from composer.errors import InvalidFile, NotSupported
from composer.formats.adapters.config import parts

Tensors = Mapping[str, torch.Tensor]
Size = tuple[int, int]
_SIDES = ("lokr_w1", "lokr_w2")


@dataclass(frozen=True, slots=True)
class Kronecker:
    """One module's parts by PEFT's names, with s folded in. `rank` is that of factored sides, 0 if there are none."""

    module: str
    tensors: Tensors
    rank: int

    @property
    def size(self) -> Size:
        """(O, I). Raises InvalidFile for parts that do not form a product."""
        shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        try:
            return parts.lokr(shapes, {}, (0, 0))
        except KeyError as missing:
            raise misfit("missing_part", self.module, f"has no {missing.args[0]}") from missing
        except ValueError as wrong:
            raise misfit("shape_mismatch", self.module, f"has {wrong}") from wrong

    def is_full(self, side: str) -> bool:
        return side in self.tensors

    def full(self, side: str) -> torch.Tensor:
        """The side as a full matrix."""
        if self.is_full(side):
            return self.tensors[side]
        return self.tensors[f"{side}_a"] @ self.tensors[f"{side}_b"]

    def shape(self, side: str) -> Size:
        """The shape of the side as a full matrix."""
        ends = [side] * 2 if self.is_full(side) else [f"{side}_a", f"{side}_b"]
        return self.tensors[ends[0]].shape[0], self.tensors[ends[1]].shape[1]


def kronecker(module: str, tensors: Tensors, alpha: float | None) -> Kronecker:
    """The module with these parts of a file. Raises InvalidFile for parts that do not form a product of matrices."""
    flat = {name: tensor.flatten(1) if tensor.shape[2:] == (1, 1) else tensor for name, tensor in tensors.items()}
    if odd := next((name for name, tensor in flat.items() if tensor.dim() != 2 or not tensor.numel()), None):
        raise misfit("shape_mismatch", module, f"has {odd} of shape {list(flat[odd].shape)}")
    ranks = {tensor.shape[0] for name, tensor in flat.items() if name.endswith("_b")}
    if len(ranks) > 1:
        raise misfit("shape_mismatch", module, f"has factors of the ranks {', '.join(map(str, sorted(ranks)))}")
    rank = next(iter(ranks), 0)
    scale = alpha / rank if rank and alpha is not None else 1.0
    scaled = {name: tensor * scale if name in ("lokr_w2", "lokr_w2_b") else tensor for name, tensor in flat.items()}
    return Kronecker(module, scaled, rank)


def as_peft(modules: list[Kronecker]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors by PEFT's key without prefix, their config). Raises NotSupported if no single decompose_factor produces
    the splits of all modules."""
    both = any(not module.is_full("lokr_w1") for module in modules)
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    for converted in modules:
        ranks[converted.module], own = _as_made(converted, both)
        tensors |= {f"{converted.module}.{name}": tensor for name, tensor in own.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {f"^{module}": own for module, own in ranks.items() if own != rank}
    return tensors, {
        "peft_type": "LOKR",
        "target_modules": sorted(ranks),
        "r": rank,
        "alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "decompose_both": both,
        "decompose_factor": _factor(modules),
        "inference_mode": True,
    }


def _as_made(one: Kronecker, both: bool) -> tuple[int, Tensors]:
    """(r, parts): unchanged if PEFT decomposes the same sides at this rank, else full matrices, at a rank at which PEFT
    decomposes none."""
    largest = {side: max(one.shape(side)) for side in _SIDES}
    decomposed = {"lokr_w1": both and one.rank < largest["lokr_w1"] / 2, "lokr_w2": one.rank < largest["lokr_w2"] / 2}
    if one.rank and all(decomposed[side] != one.is_full(side) for side in _SIDES):
        return one.rank, one.tensors
    return (max(largest.values()) + 1) // 2, {side: one.full(side) for side in _SIDES}


def _factor(modules: list[Kronecker]) -> int:
    """The decompose_factor with which PEFT splits every module as here."""
    splits = {
        (own, other) for module in modules for own, other in zip(module.shape("lokr_w1"), module.size, strict=True)
    }
    for factor in (-1, *sorted({own for own, _ in splits}, reverse=True)):
        if all(_first(product, factor) == own for own, product in splits):
            return factor
    message = "The modules are split by different factors, but PEFT has one decompose_factor for all."
    raise NotSupported("lokr_factors", message)


def _first(dimension: int, factor: int) -> int:
    """The smaller of the two numbers into which PEFT splits a dimension: the factor if it divides, else the largest
    divisor not above the root."""
    if factor > 0 and dimension % factor == 0:
        return factor
    limit = dimension if factor == -1 else factor
    return max(
        divisor for divisor in range(1, int(dimension**0.5) + 1) if dimension % divisor == 0 and divisor <= limit
    )


def misfit(code: str, module: str, what: str) -> InvalidFile:
    next_step = "Export the adapter again, or name the base it was trained on."
    return InvalidFile(code, f"{module} {what}.", subject=module, next_step=next_step)
