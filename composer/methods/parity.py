"""The exact values of PEFT's `add_weighted_adapter`, to reproduce combinations made with it.

Its plain modes combine A and B separately, which adds cross terms: for two unrelated adapters, its `linear` differs
from the weighted sum by as much as the sum itself. The formulas follow PEFT 0.21 and are tested against it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import copysign, sqrt

import torch

from composer.deltas.delta import LowRank
from composer.deltas.lowrank import numerical_rank
from composer.errors import Mismatch
from composer.formats.adapters.config.config import AdapterConfig
from composer.formats.recipes.methods import PeftCombination
from composer.methods.basis import pair_of
from composer.methods.join import elect
from composer.methods.matrix import Matrix, largest
from composer.methods.spectral import Compression, decomposing


@dataclass(frozen=True, slots=True)
class Parity:
    """`combination` is PEFT's `combination_type`, `rank` is the new config's, and `scale` is the factor PEFT will use.
    Random masks come from one generator, in the order of the slots."""

    combination: str
    density: float
    rank: int
    scale: float
    generator: torch.Generator

    @classmethod
    def of(cls, settings: PeftCombination, configs: Sequence[AdapterConfig]) -> "Parity":
        """The combination for these adapter configs. A single adapter is always combined linearly."""
        combination = "linear" if len(configs) == 1 else settings.pipeline.parity
        ranks = [max([config.rank, *config.rank_pattern.values()]) for config in configs]
        asked = settings.rank if combination.endswith("svd") else None
        rank = asked or (sum(ranks) if combination == "cat" else max(ranks))
        # PEFT's new config keeps the first adapter's use_rslora with alpha = r, so its scale is √r and not 1.
        scale = sqrt(rank) if configs[0].use_rslora else 1.0
        generator = torch.Generator().manual_seed(settings.seed)
        return cls(combination, settings.density, rank, scale, generator)

    def combined(self, parts: Sequence[tuple[LowRank, float]]) -> tuple[LowRank, Compression | None]:
        """The combined delta of one slot, and the loss from truncation to the rank.

        Raises Mismatch for unequal ranks if A and B are combined separately, and NotSupported if the SVD fails.
        """
        lost: Compression | None = None
        parts = [(replace(part, A=part.A_RI.float(), B=part.B_OR.float()), weight) for part, weight in parts]
        if self.combination == "cat":
            A_RI = torch.cat([delta.A_RI * (weight * delta.scale) for delta, weight in parts])
            B_OR = torch.cat([delta.B_OR for delta, _ in parts], dim=1)
        elif self.combination.endswith("svd"):
            B_OR, A_RI, lost = self._truncated(parts)
        else:
            B_OR, A_RI = self._apart(parts)
        return replace(parts[0][0], A=A_RI, B=B_OR, scale=self.scale), lost

    def _truncated(self, parts: Sequence[tuple[LowRank, float]]) -> tuple[torch.Tensor, torch.Tensor, Compression]:
        """The truncated SVD of the sum; all singular values go into B."""
        dense = [B @ A for B, A in (pair_of(delta) for delta, _ in parts)]
        total = self._join(dense, [weight for _, weight in parts], self.combination.removesuffix("_svd"))
        rank, module = self.rank, parts[0][0].module
        with decomposing(module):
            U, sigma, Vh = torch.linalg.svd(total, full_matrices=False)
        norm, error = (float(part.double().norm()) for part in (sigma, sigma[rank:]))
        return U[:, :rank] * sigma[:rank], Vh[:rank], Compression(module, rank, numerical_rank(sigma), norm, error)

    def _apart(self, parts: Sequence[tuple[LowRank, float]]) -> tuple[torch.Tensor, torch.Tensor]:
        if len({delta.rank for delta, _ in parts}) > 1:
            message = f"{parts[0][0].module} has adapters of different ranks, so A and B cannot be combined separately."
            raise Mismatch("ranks_differ", message, subject=parts[0][0].module)
        roots = [sqrt(abs(weight * delta.scale)) for delta, weight in parts]
        signed = [copysign(root, weight * delta.scale) for root, (delta, weight) in zip(roots, parts, strict=True)]
        A_RI = self._join([delta.A_RI for delta, _ in parts], signed, self.combination)
        return self._join([delta.B_OR for delta, _ in parts], roots, self.combination), A_RI

    def _join(self, tensors: Sequence[torch.Tensor], weights: Sequence[float], step: str) -> torch.Tensor:
        if step.startswith("dare"):
            tensors = [self._pruned(tensor) for tensor in tensors]
        elif step in ("ties", "magnitude_prune"):
            tensors = [self._trimmed(tensor) for tensor in tensors]
        X_TMN = torch.stack(list(tensors))
        if step.endswith("ties"):
            return elect(X_TMN, weights)
        return torch.tensordot(X_TMN.new_tensor(weights), X_TMN, dims=1)

    def _pruned(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.density >= 1:
            return tensor
        # Drawn on the CPU, so that the mask is the same on every device.
        mask = torch.bernoulli(torch.full(tensor.shape, self.density), generator=self.generator)
        return tensor * mask.to(tensor.device) / self.density

    def _trimmed(self, tensor: torch.Tensor) -> torch.Tensor:
        (kept,) = largest([Matrix.of(tensor)], int(self.density * tensor.numel()))
        return kept.kept(tensor, 0)
