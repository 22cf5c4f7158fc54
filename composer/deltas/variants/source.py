"""The tensors of a placed module, and how results computed from them become deltas of the stored weight.

Shapes: O outputs and I inputs of the module (a kernel's elements counted), R rank; a stored matrix is M x N.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

import torch

from composer.deltas.delta import Delta, Layout, LowRank, Rows, RowsOn, RowwiseDelta
from composer.deltas.stored import Factor, MappedFile
from composer.errors import InvalidFile
from composer.formats.adapters.config.config import AdapterConfig
from composer.formats.adapters.facts import Adapter
from composer.formats.adapters.placement.result import PlacedModule

_ALL = slice(None)


@dataclass(frozen=True, slots=True)
class ModuleParts:
    """`module["lora_A"]` is the part's tensor, mapped from `file`, the adapter's weights."""

    adapter: Adapter
    file: MappedFile
    placed: PlacedModule

    def __getitem__(self, part: str) -> torch.Tensor:
        return self.file.tensor(self.adapter.header.tensors[self.placed.parts[part]])

    @property
    def only(self) -> torch.Tensor:
        """The tensor of a module that has one part."""
        (part,) = self.placed.parts
        return self[part]

    def __contains__(self, part: str) -> bool:
        return part in self.placed.parts

    @property
    def config(self) -> AdapterConfig:
        return self.adapter.config

    @property
    def options(self) -> Mapping[str, bool | int | float | str]:
        return self.config.options

    @property
    def layout(self) -> Layout:
        return Layout(self.placed.layout)

    @property
    def stored_shape(self) -> tuple[int, int]:
        """O x I; the dimensions of a convolution's kernel count as inputs."""
        shape = self.placed.shape
        return shape[0], prod(shape[1:])

    @property
    def size(self) -> tuple[int, int]:
        """(O, I)."""
        rows, columns = self.stored_shape
        return (rows, columns) if self.layout is Layout.LINEAR else (columns, rows)

    def factor(self, part: str) -> Factor:
        """The part as a matrix, its first dimension as rows."""
        return self.file.factor(self.adapter.header.tensors[self.placed.parts[part]])

    def value(self, part: str) -> torch.Tensor:
        """The part in float32: mapped parts may differ in dtype, and half precision would round intermediate
        results."""
        return self[part].float()

    def low_rank(self, A: Factor, B: Factor, scale: float = 1.0) -> LowRank:
        """The module's delta scale * B @ A, with A R x I and B O x R."""
        placed = self.placed
        return LowRank(
            module=placed.module, weight=placed.weight, layout=self.layout, A=A, B=B, scale=scale,
            tied=placed.tied, kernel=placed.shape[2:], twin=placed.twin, nested=placed.nested,
        )  # fmt: skip

    def computed(
        self,
        rows: Rows,
        *,
        rows_on: RowsOn | None = None,
        reads_base: bool = True,
        rescales: bool = True,
        alone: bool = False,
        all_rows: bool = False,
    ) -> RowwiseDelta:
        """A computed delta. `rows` and `rows_on` map rows of O x I to rows of O x I; a weight stored transposed passes
        all at once. `rescales` only holds for one that reads the base."""
        placed, straight = self.placed, self.layout is Layout.LINEAR

        def turned(W_MN: torch.Tensor, begin: int) -> torch.Tensor:
            return rows(W_MN.T, 0).T

        def turned_on(W_MN: torch.Tensor, now_MN: torch.Tensor, begin: int) -> torch.Tensor:
            return W_MN if rows_on is None else rows_on(W_MN.T, now_MN.T, 0).T

        return RowwiseDelta(
            module=placed.module, weight=placed.weight, stored_shape=self.stored_shape,
            rows=rows if straight else turned, reads_base=reads_base, rescales=reads_base and rescales, alone=alone,
            all_rows=all_rows or not straight, tied=placed.tied, layout=self.layout, kernel=placed.shape[2:],
            twin=placed.twin, rows_on=rows_on if straight or rows_on is None else turned_on,
        )  # fmt: skip

    def indices(self, part: str, below: int, own: slice = _ALL) -> torch.Tensor:
        """Integers in [0, below) from some rows of the part, as int64, since PEFT on Windows saves them as floats.
        Raises InvalidFile for other values, which would read arbitrary entries."""
        stored = self[part][own]
        indices = stored.long()
        if not torch.equal(indices.to(stored.dtype), stored) or (
            indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < below
        ):
            key = self.placed.parts[part]
            raise InvalidFile(
                "bad_index",
                f"{key} has indices that are not whole numbers below {below}.",
                subject=key,
                next_step="Save the adapter again, or name the base it was trained on.",
            )
        return indices


Read = Callable[[ModuleParts], list[Delta]]
"""Makes the deltas of a placed module: one with all that it adds to its weight, or one for each piece of experts."""
