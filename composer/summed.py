"""Numbers that are counted place by place and add up: quotients are taken of the sums."""

from dataclasses import fields
from typing import Self


class Summed:
    """A dataclass whose sum with another has the sums of their fields."""

    __slots__ = ()

    def __add__(self, other: Self) -> Self:
        names = [field.name for field in fields(self)]  # pyright: ignore[reportArgumentType]
        return type(self)(*(getattr(self, name) + getattr(other, name) for name in names))
