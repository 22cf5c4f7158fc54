"""What one adapter adds to one weight.

Shapes: O outputs and I inputs of the module, R rank. A weight is stored O x I by `nn.Linear`; by GPT-2's `Conv1D` and
by `nn.Embedding` it is stored I x O ("transposed"), where I of an embedding is the vocabulary.
"""

from dataclasses import dataclass
from enum import StrEnum

import torch


class Layout(StrEnum):
    """How the targeted weight is stored relative to the factors."""

    LINEAR = "linear"
    CONV1D = "conv1d"
    EMBEDDING = "embedding"


@dataclass(frozen=True, slots=True)
class LowRank:
    """delta = scale * B @ A, float32, in the orientation PEFT trains: A is R x I, B is O x R.

    `module` is the path without `base_model.model.`; `weight` is the checkpoint tensor it adds to. `tied` says that
    this tensor also serves as another module's weight (an input embedding shared with the output head).
    """

    module: str
    weight: str
    layout: Layout
    A_RI: torch.Tensor
    B_OR: torch.Tensor
    scale: float
    tied: bool = False

    @property
    def rank(self) -> int:
        return self.A_RI.shape[0]

    @property
    def stored_shape(self) -> tuple[int, int]:
        """Shape of W on disk."""
        outputs, inputs = self.B_OR.shape[0], self.A_RI.shape[1]
        return (outputs, inputs) if self.layout is Layout.LINEAR else (inputs, outputs)

    def stored_factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(left, right) with the scale folded into left: W as stored on disk becomes W + left @ right."""
        if self.layout is Layout.LINEAR:
            return self.B_OR * self.scale, self.A_RI
        return self.A_RI.T * self.scale, self.B_OR.T


@dataclass(frozen=True, slots=True)
class Replacement:
    """A tensor saved whole (`modules_to_save`, `bias`): it takes the place of the base's. `tied` as in LowRank."""

    module: str
    weight: str
    tensor: torch.Tensor
    tied: bool = False


Delta = LowRank | Replacement
