"""The delta that one adapter adds to one weight. For every type of adapter, merging is W + Σ w_i Δ_i(W): a sum over
deltas computed from the base's W or, if an order is given, each from W plus those before it. Most deltas are a low-rank
product of factors. The others are computed row by row, and some of them read W (DoRA, OFT, …).

Shapes: O outputs and I inputs of the module, R rank. A weight is stored O x I by `nn.Linear`; by GPT-2's `Conv1D` and
by `nn.Embedding` it is stored I x O ("transposed"), where I of an embedding is the vocabulary. A stored tensor with
more dimensions is viewed as a matrix of M rows and N columns: a convolution as O x (I * kernel), a stack of experts as
(E * rows) x columns, where `begin` is the first row of the expert.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import torch

from composer.deltas.stored import Factor, SpillFile, StoredFactor, factor_on, read_into, tensor_of

_AT_ONCE = 1 << 20  # bytes
NOTHING = 1e-20
"""A delta whose entries are all below this adds nothing: weights are about 1e-2, and float32 keeps seven digits."""


class Layout(StrEnum):
    """The orientation of the stored weight relative to the factors."""

    LINEAR = "linear"
    CONV1D = "conv1d"
    EMBEDDING = "embedding"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSlice:
    """The position of an expert's delta in `parameter`, which stacks all `experts` of a layer in memory: from row
    `begin` of its matrix, and from output `first` of the expert's own `outputs`."""

    parameter: str
    expert: int
    experts: int
    first: int
    outputs: int
    begin: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """delta = scale * B @ A in the orientation PEFT trains: A is R x I, B is O x R, each in the float dtype of the
    adapter's file, in memory or in a file. `stored_factors` are float32.

    `module` is the path without `base_model.model.`; `weight` is the checkpoint tensor it adds to, from row `begin` of
    its matrix. `tied` means that this tensor is also another module's weight (an input embedding shared with the output
    head); `twin` means that the other module has the same delta, so one addition serves both. `kernel` is the kernel's
    shape for a convolution, whose I counts its elements too. `stacked` is set for an expert. `nested` is set for the
    output projection of a packed attention, which PEFT wraps inside the attention's own pair and adds twice (`scale`
    includes that).
    """

    module: str
    weight: str
    layout: Layout
    A: Factor
    B: Factor
    scale: float
    tied: bool = False
    begin: int = 0
    kernel: tuple[int, ...] = ()
    twin: bool = False
    stacked: ExpertSlice | None = None
    nested: bool = False

    @property
    def A_RI(self) -> torch.Tensor:  # noqa: N802
        """A as a tensor. If it is stored, the pages read stay in memory until `drop_pages`."""
        return tensor_of(self.A)

    @property
    def B_OR(self) -> torch.Tensor:  # noqa: N802
        return tensor_of(self.B)

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def stored(self) -> bool:
        """Whether both factors lie in files."""
        return isinstance(self.A, StoredFactor) and isinstance(self.B, StoredFactor)

    def to(self, device: torch.device) -> "LowRank":
        """The delta with its factors on a device. On the CPU, stored factors stay in their files."""
        if device.type == "cpu" and self.stored:
            return self
        return replace(self, A=factor_on(device, self.A), B=factor_on(device, self.B))

    def drop_pages(self) -> None:
        """Drops the resident pages of the files behind the factors."""
        for factor in (self.A, self.B):
            if isinstance(factor, StoredFactor):
                factor.drop()

    @property
    def stored_shape(self) -> tuple[int, int]:
        """(M, N): the rows of the stored matrix that the delta adds to, and its columns."""
        outputs, inputs = self.B.shape[0], self.A.shape[1]
        return (outputs, inputs) if self.layout is Layout.LINEAR else (inputs, outputs)

    def stored_factors(self, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        """(left, right) with the scale folded into left: W as stored on disk becomes W + left @ right."""
        return tensor_of(self._left).to(dtype) * self.scale, tensor_of(self._right).to(dtype)

    def stored_left_into(self, rows: slice, out: torch.Tensor) -> None:
        """Writes some rows of `left` into `out`, without other memory."""
        read_into(out, self._left[rows])
        out.mul_(self.scale)

    def stored_right_into(self, out: torch.Tensor) -> None:
        """Reads the stored right factor, R x N in float32, into `out`."""
        read_into(out, self._right)

    def stored_rows(self, rows: Sequence[int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """(those rows of left, right), with at most a megabyte of other memory."""
        left, right = tensor_of(self._left), torch.empty(self._right.shape, dtype=dtype)
        self.stored_right_into(right)
        if left.nbytes <= _AT_ONCE:  # row by row takes twenty times as long
            everything = torch.empty(left.shape, dtype=left.dtype)
            read_into(everything, self._left)
            return everything[rows].to(dtype) * self.scale, right
        picked = torch.empty(len(rows), self.rank, dtype=dtype)
        for index, row in enumerate(rows):
            self.stored_left_into(slice(row, row + 1), picked[index : index + 1])
        return picked, right

    @property
    def _left(self) -> Factor:
        return self.B if self.layout is Layout.LINEAR else self.A.T

    @property
    def _right(self) -> Factor:
        return self.A if self.layout is Layout.LINEAR else self.B.T


Rows = Callable[[torch.Tensor, int], torch.Tensor]
"""(W_MN, first row) -> Δ_MN: the delta for these rows of the stored matrix, in W's dtype (float32 or float64)."""

RowsOn = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
"""(W_MN, now_MN, first row) -> the delta to `now` of what was trained on W."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowwiseDelta:
    """A delta that is not a low-rank product: `rows` computes its rows on demand from the base's rows.

    `rows` counts from the delta's own first row, which is row `begin` of the stored matrix as in LowRank.
    `stored_shape` is M x N; `layout` and `kernel` describe rows and columns, so that the delta can be compressed to
    factors. `reads_base`: `rows` reads W. `rescales`: two such deltas of one weight have no common order of training
    (DoRA, OFT, …). `alone`: trained on a different weight than W (KaSA), unlike any other delta. `all_rows`: all M rows
    are needed at once (a norm over a column of a transposed weight). `sets_rows`: rows that are set regardless of the
    base; two deltas cannot both set one row. `rows_on`: the delta to a weight that other adapters have changed,
    with what it computes from W (a norm) left as it is. `stacked` is as in LowRank.
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
    rows_on: RowsOn | None = None
    stacked: ExpertSlice | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Replacement:
    """A fully saved tensor (`modules_to_save`, `bias`) that replaces the base's. `tied` and `twin` are as in
    LowRank."""

    module: str
    weight: str
    tensor: torch.Tensor
    tied: bool = False
    twin: bool = False


Additive = LowRank | RowwiseDelta
Delta = LowRank | RowwiseDelta | Replacement


def names_of(delta: Delta) -> tuple[str, ...]:
    """The names by which a weight rule may match the delta: its module, and its stack if it is an expert."""
    stacked = None if isinstance(delta, Replacement) else delta.stacked
    return (delta.module, stacked.parameter) if stacked else (delta.module,)


def spilled(spill: SpillFile, deltas: Sequence[LowRank]) -> list[LowRank]:
    """The deltas with their factors spilled to disk, where they take no memory until they are read."""
    factors = iter(spill.put([factor for delta in deltas for factor in (delta.A_RI, delta.B_OR)]))
    return [replace(delta, A=next(factors), B=next(factors)) for delta in deltas]
