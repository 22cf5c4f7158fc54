"""What one adapter adds to one weight.

Whatever the adapter's type, merging is W + Σ w_i Δ_i(W): a sum over deltas that are taken from the base's own W or,
where an order is stated, each from W plus those before it. Most deltas are a short product of factors; the others are
computed row by row, some of them with a look at W (DoRA, OFT, …).

Shapes: O outputs and I inputs of the module, R rank. A weight is stored O x I by `nn.Linear`; by GPT-2's `Conv1D` and
by `nn.Embedding` it is stored I x O ("transposed"), where I of an embedding is the vocabulary. A stored tensor of more
dimensions is seen as a matrix of M rows and N columns: a convolution O x (I * kernel), a stack of experts (E * rows) x
columns, where `begin` is the first row of the expert.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import torch

from composer.deltas.tensors import SpillFile, read_into

_AT_ONCE = 1 << 20  # bytes
NOTHING = 1e-20
"""A delta without an entry of this size adds nothing: weights are some 1e-2, of which float32 keeps seven digits."""


class Layout(StrEnum):
    """How the targeted weight is stored relative to the factors."""

    LINEAR = "linear"
    CONV1D = "conv1d"
    EMBEDDING = "embedding"


@dataclass(frozen=True, slots=True)
class ExpertSlice:
    """Where an expert's delta lies in `parameter`, which stacks all `experts` of a layer in memory: from row `begin` of
    its matrix, and of the expert's own `outputs` from the `first` on."""

    parameter: str
    expert: int
    experts: int
    first: int
    outputs: int
    begin: int


@dataclass(frozen=True, slots=True)
class LowRank:
    """delta = scale * B @ A in the orientation PEFT trains: A is R x I, B is O x R, each in whatever float dtype the
    adapter's file has. `stored_factors` are float32.

    `module` is the path without `base_model.model.`; `weight` is the checkpoint tensor it adds to, from row `begin` of
    its matrix. `tied` says that this tensor also serves as another module's weight (an input embedding shared with the
    output head), `twin` that the other module has the very same delta, so that one addition serves both. `kernel` is
    the kernel's shape where the weight is a convolution's, whose I counts its elements too. `stacked` is set of an
    expert; `nested` of the output projection of a packed attention, which PEFT wraps inside of the attention's own pair
    and adds twice (so does `scale`).
    """

    module: str
    weight: str
    layout: Layout
    A_RI: torch.Tensor
    B_OR: torch.Tensor
    scale: float
    tied: bool = False
    begin: int = 0
    kernel: tuple[int, ...] = ()
    twin: bool = False
    stacked: ExpertSlice | None = None
    nested: bool = False

    @property
    def rank(self) -> int:
        return self.A_RI.shape[0]

    @property
    def stored_shape(self) -> tuple[int, int]:
        """(M, N): the rows of the stored matrix that it adds to, and its columns."""
        outputs, inputs = self.B_OR.shape[0], self.A_RI.shape[1]
        return (outputs, inputs) if self.layout is Layout.LINEAR else (inputs, outputs)

    def stored_factors(self, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        """(left, right) with the scale folded into left: W as stored on disk becomes W + left @ right."""
        return self._left.to(dtype) * self.scale, self._right.to(dtype)

    def stored_left_into(self, rows: slice, out: torch.Tensor) -> None:
        """Some rows of it, in memory that is there, and in no other."""
        read_into(out, self._left[rows])
        out.mul_(self.scale)

    def stored_right_into(self, out: torch.Tensor) -> None:
        read_into(out, self._right)

    def stored_rows(self, rows: Sequence[int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """(those rows of left, right), in no other memory but a megabyte."""
        left, right = self._left, torch.empty(self._right.shape, dtype=dtype)
        self.stored_right_into(right)
        if left.nbytes <= _AT_ONCE:  # a row at a time takes twenty times as long
            whole = torch.empty(left.shape, dtype=left.dtype)
            read_into(whole, left)
            return whole[rows].to(dtype) * self.scale, right
        picked = torch.empty(len(rows), self.rank, dtype=dtype)
        for place, row in enumerate(rows):
            self.stored_left_into(slice(row, row + 1), picked[place : place + 1])
        return picked, right

    @property
    def _left(self) -> torch.Tensor:
        return self.B_OR if self.layout is Layout.LINEAR else self.A_RI.T

    @property
    def _right(self) -> torch.Tensor:
        return self.A_RI if self.layout is Layout.LINEAR else self.B_OR.T


Rows = Callable[[torch.Tensor, int], torch.Tensor]
"""(W_MN, first row) -> Δ_MN: what is added to these rows of the stored matrix, in W's dtype (float32 or float64)."""


@dataclass(frozen=True, slots=True)
class RowwiseDelta:
    """A delta that is no short product: `rows` gives its rows when they are needed, from the base's rows.

    `rows` counts from the delta's own first row, `begin` of the stored matrix as in LowRank; `stored_shape` is M x N,
    `layout` and `kernel` say what the rows and columns are, so that it can be compressed to factors.
    `reads_base` says that `rows` looks at W, `rescales` that two such deltas of one weight have no order that both were
    trained in (DoRA, OFT, …), `alone` that it was trained on another weight than W (KaSA), on which no other delta was.
    `all_rows` says that all M rows are needed at once (a norm over a column of a transposed
    weight). `sets_rows` are rows that become what they are whatever the base has there: two deltas cannot both do that
    to one row. `stacked` as in LowRank.
    """

    module: str
    weight: str
    stored_shape: tuple[int, int]
    rows: Rows
    reads_base: bool = False
    rescales: bool = False
    alone: bool = False
    all_rows: bool = False
    tied: bool = False
    begin: int = 0
    layout: Layout = Layout.LINEAR
    kernel: tuple[int, ...] = ()
    twin: bool = False
    sets_rows: frozenset[int] = frozenset()
    stacked: ExpertSlice | None = None


@dataclass(frozen=True, slots=True)
class Replacement:
    """A tensor saved whole (`modules_to_save`, `bias`): it takes the place of the base's. `tied` and `twin` as in
    LowRank."""

    module: str
    weight: str
    tensor: torch.Tensor
    tied: bool = False
    twin: bool = False


Additive = LowRank | RowwiseDelta
Delta = LowRank | RowwiseDelta | Replacement


def names_of(delta: Delta) -> tuple[str, ...]:
    """What a weight's rule may call it: its module, and the stack that it is an expert of."""
    stacked = None if isinstance(delta, Replacement) else delta.stacked
    return (delta.module, stacked.parameter) if stacked else (delta.module,)


def mapped(aside: SpillFile, deltas: Sequence[LowRank]) -> list[LowRank]:
    """The same with their factors on the disk, where they take no memory until they are looked at."""
    factors = iter(aside.put([factor for delta in deltas for factor in (delta.A_RI, delta.B_OR)]))
    return [replace(delta, A_RI=next(factors), B_OR=next(factors)) for delta in deltas]
