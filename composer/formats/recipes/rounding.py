"""The single rounding of a merge, from float32 to the output's dtype: to the nearest value, or stochastically up or
down.

Rounding to nearest loses everything smaller than half a step of the weight. Stochastic rounding goes to the upper
neighbour with a probability equal to the distance already covered towards it, so that the mean over many weights is
what was added (Gupta et al., arXiv 1502.02551): single values are less exact, sums over them more.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import TypedDict

from composer.errors import NotSupported
from composer.formats.untrusted import printable


class Mode(StrEnum):
    NEAREST = "nearest"
    STOCHASTIC = "stochastic"


@dataclass(frozen=True, slots=True)
class Rounding:
    """How values are rounded to the output's dtype; `seed` matters for the stochastic mode alone. The choice at a value
    depends on the seed, the tensor's name and the value's position in it: not on chunks, threads, the device or other
    adapters."""

    mode: Mode = Mode.NEAREST
    seed: int = 0

    @property
    def steps(self) -> float:
        """The maximum distance of a rounded value from the exact one, in steps between neighbours."""
        return 0.5 if self.mode is Mode.NEAREST else 1.0


def parse_rounding(mode: str, seed: int = 0) -> Rounding:
    """Parses a rounding. Raises NotSupported for an unknown mode or a seed that is not a 64-bit number."""
    if mode not in list(Mode):
        message = f"Unknown rounding {printable(mode)}."
        raise NotSupported("rounding", message, subject=mode, next_step=f"Use one of {', '.join(Mode)}.")
    if not 0 <= seed < 2**64:
        raise NotSupported("seed", f"The seed {seed} must be from 0 to 2^64 - 1.", subject=str(seed))
    return Rounding(Mode(mode), seed)


class RoundingDocument(TypedDict):
    mode: str
    seed: int


class RoundingPart(TypedDict, total=False):
    """The rounding in a recipe's or a lock's document, which lacks it for `nearest`."""

    rounding: RoundingDocument


def rounding_json(rounding: Rounding) -> RoundingPart:
    """The rounding for a document; empty for `nearest`, so that a lock without it keeps its digest."""
    if rounding.mode is Mode.NEAREST:
        return {}
    return {"rounding": {"mode": rounding.mode.value, "seed": rounding.seed}}
