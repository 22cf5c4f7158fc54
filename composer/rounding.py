"""The one rounding of a merge, from float32 to the output's dtype: to the nearest value, or up or down by chance.

Rounding to the nearest loses what is smaller than half a step of the weight it is added to. Stochastic rounding goes to
the upper neighbour with the probability of its share of the way there, so that the mean over many weights is what was
added (Gupta et al., arXiv 1502.02551): single values are less exact, sums over them more.
"""

import hashlib
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import torch

from composer.errors import NotSupported
from composer.text import shown

_LANES = 16  # 16-bit numbers in one block of Philox 4x64
_DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}  # of float32's 23, in normal numbers
_SMALLEST_NORMAL_FLOAT16 = 2.0**-14
_STEPS_FLOAT16 = 2.0**24  # of a subnormal float16 in 1


class Mode(StrEnum):
    NEAREST = "nearest"
    STOCHASTIC = "stochastic"


@dataclass(frozen=True, slots=True)
class Rounding:
    """How values become the output's dtype; `seed` counts for the stochastic mode alone.

    The chance at one value depends on the seed, the tensor's name and the value's place in it: not on chunks, threads,
    the device or what else is merged.
    """

    mode: Mode = Mode.NEAREST
    seed: int = 0

    @property
    def steps(self) -> float:
        """How far from the exact value a rounded one may lie, in steps between neighbours."""
        return 0.5 if self.mode is Mode.NEAREST else 1.0

    def into(self, out: torch.Tensor, exact: torch.Tensor, name: str, begin: int) -> None:
        """Write `exact`, the values of tensor `name` from element `begin` on, into `out`."""
        if self.mode is Mode.NEAREST or out.dtype not in _DROPPED_BITS or exact.dtype is not torch.float32:
            out.copy_(exact)
        else:
            _round_by_chance(out, exact, self._chances(name, begin, exact.numel()).reshape(exact.shape))

    def _chances(self, name: str, begin: int, count: int) -> torch.Tensor:
        """Uniform integers below 2^16, one a value, as int32; any part of a tensor's can be made on its own."""
        key = hashlib.blake2b(name.encode(), digest_size=8, key=self.seed.to_bytes(8, "little")).digest()
        first = begin // _LANES
        blocks = -(-(begin + count) // _LANES) - first
        raw = np.random.Philox(key=int.from_bytes(key, "little"), counter=first).random_raw(blocks * 4)
        skipped = begin - first * _LANES
        return torch.from_numpy(raw.view(np.uint16)[skipped : skipped + count].astype(np.int32))


def parse_rounding(mode: str, seed: int = 0) -> Rounding:
    """Raises NotSupported for an unknown mode or a seed that is no 64-bit number."""
    if mode not in list(Mode):
        message = f"There is no rounding {shown(mode)}."
        raise NotSupported("rounding", message, subject=mode, next_step=f"Use one of {', '.join(Mode)}.")
    if not 0 <= seed < 2**64:
        raise NotSupported(
            "seed", f"{seed} is no seed.", subject=str(seed), next_step="Use a whole number from 0 to 2^64 - 1."
        )
    return Rounding(Mode(mode), seed)


def _round_by_chance(out: torch.Tensor, exact: torch.Tensor, chances: torch.Tensor) -> None:
    """Adds a chance below one step to the magnitude and cuts off what `out` cannot hold: exact in integers.

    A NaN stays one and an infinity too: their chances are none.
    """
    dropped = _DROPPED_BITS[out.dtype]
    chances = torch.where(exact.isfinite(), chances >> (16 - dropped), 0)
    bits = (exact.view(torch.int32) + chances) & -(1 << dropped)
    rounded = bits.view(torch.float32)
    if out.dtype is torch.float16:
        small = exact.abs() < _SMALLEST_NORMAL_FLOAT16
        steps = (exact.abs() * _STEPS_FLOAT16 + chances * 2.0**-dropped).floor() / _STEPS_FLOAT16
        rounded = torch.where(small, steps.copysign(exact), rounded)
    out.copy_(rounded)
