"""The numbers of a safetensors file in numpy, and counts that add up over blocks."""

from dataclasses import fields
from typing import Any, Self

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]

NUMPY_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4"}
"""The numpy dtype of each dtype's bytes, for `as_float64`."""


def as_float64(stored: npt.NDArray[Any], dtype: str) -> Float64:
    """bfloat16 is the upper half of a float32; numpy has no name for it."""
    if dtype == "BF16":
        return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return np.asarray(stored, dtype=np.float64)


class Summed:
    """A dataclass whose sum with another has the sums of the fields."""

    __slots__ = ()

    def __add__(self, other: Self) -> Self:
        names = [field.name for field in fields(self)]  # pyright: ignore[reportArgumentType]
        return type(self)(**{name: getattr(self, name) + getattr(other, name) for name in names})
