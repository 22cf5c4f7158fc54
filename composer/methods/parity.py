"""The values of PEFT's `add_weighted_adapter`, as they are: to reproduce a combination that was made with it.

Its plain modes work on A and B apart, which adds cross terms: two unrelated adapters combined by its `linear` are off
from the weighted sum by as much as the sum itself. Formulas were read from PEFT 0.21 and are tested against it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import copysign, sqrt
from typing import cast

import torch

from composer.delta import LowRank
from composer.errors import Mismatch
from composer.methods.basis import pair_of
from composer.methods.join import elect
from composer.methods.matrix import Matrix, largest
from composer.methods.spectral import decomposing


@dataclass(frozen=True, slots=True)
class Parity:
    """`combination` is PEFT's `combination_type`. Random masks come from one generator, in the order of the places."""

    combination: str
    density: float
    rank: int | None
    generator: torch.Generator

    @classmethod
    def of(cls, combination: str, settings: Mapping[str, object]) -> "Parity":
        generator = torch.Generator().manual_seed(cast(int, settings["seed"]))
        return cls(combination, cast(float, settings["density"]), cast("int | None", settings["rank"]), generator)

    def combined(self, parts: Sequence[tuple[LowRank, float]], count: int) -> LowRank:
        """The deltas of one place. `count` is the number of all adapters: a single one is always combined linearly.

        Raises Mismatch for unequal ranks where A and B are combined apart, NotSupported where no SVD is found.
        """
        parts = [(replace(one, A_RI=one.A_RI.float(), B_OR=one.B_OR.float()), weight) for one, weight in parts]
        if self.combination == "cat":
            A_RI = torch.cat([delta.A_RI * (weight * delta.scale) for delta, weight in parts])
            B_OR = torch.cat([delta.B_OR for delta, _ in parts], dim=1)
        elif self.combination.endswith("svd") and count > 1:
            B_OR, A_RI = self._truncated(parts)
        else:
            B_OR, A_RI = self._apart(parts)
        return replace(parts[0][0], A_RI=A_RI, B_OR=B_OR, scale=1.0)

    def _truncated(self, parts: Sequence[tuple[LowRank, float]]) -> tuple[torch.Tensor, torch.Tensor]:
        """All singular values go into B."""
        dense = [B @ A for B, A in (pair_of(delta) for delta, _ in parts)]
        total = self._join(dense, [weight for _, weight in parts], self.combination.removesuffix("_svd"))
        rank = self.rank or max(delta.rank for delta, _ in parts)
        with decomposing(parts[0][0].module):
            U, sigma, Vh = torch.linalg.svd(total, full_matrices=False)
        return U[:, :rank] * sigma[:rank], Vh[:rank]

    def _apart(self, parts: Sequence[tuple[LowRank, float]]) -> tuple[torch.Tensor, torch.Tensor]:
        if len({delta.rank for delta, _ in parts}) > 1:
            message = f"{parts[0][0].module} has adapters of different ranks, whose A and B cannot be combined apart."
            raise Mismatch("ranks_differ", message, subject=parts[0][0].module, next_step="Use peft_cat or peft_svd.")
        roots = [sqrt(abs(weight * delta.scale)) for delta, weight in parts]
        signed = [copysign(root, weight * delta.scale) for root, (delta, weight) in zip(roots, parts, strict=True)]
        step = "linear" if self.combination.endswith("svd") else self.combination
        A_RI = self._join([delta.A_RI for delta, _ in parts], signed, step)
        return self._join([delta.B_OR for delta, _ in parts], roots, step), A_RI

    def _join(self, tensors: Sequence[torch.Tensor], weights: Sequence[float], step: str) -> torch.Tensor:
        if step.startswith("dare"):
            tensors = [self._pruned(tensor) for tensor in tensors]
        elif step in ("ties", "magnitude_prune"):
            tensors = [self._trimmed(tensor) for tensor in tensors]
        X_TMN = torch.stack(list(tensors))
        return elect(X_TMN, weights) if step.endswith("ties") else torch.tensordot(torch.tensor(weights), X_TMN, dims=1)

    def _pruned(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.density >= 1:
            return tensor
        mask = torch.bernoulli(torch.full_like(tensor, self.density), generator=self.generator)
        return tensor * mask / self.density

    def _trimmed(self, tensor: torch.Tensor) -> torch.Tensor:
        (kept,) = largest([Matrix.of(tensor)], int(self.density * tensor.numel()))
        return kept.kept(tensor, 0)
