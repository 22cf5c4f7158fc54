"""Chooses the cases that run by default: each promise in one form, and the others with the marker `long`."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from typing import TypeVar

import pytest
from _pytest.mark import ParameterSet

Case = TypeVar("Case")


def further(*values: object) -> list[ParameterSet]:
    """Moments, faults or amounts of a promise that another value keeps by default: `["crash", *further("hang")]`."""
    return [_form(value, default=False) for value in values]


def one_of_each(cases: Iterable[Case], kind: Callable[[Case], object]) -> list[ParameterSet]:
    """Runs one case of each kind by default: of the first kind its first, of the second its second, and so on
    cyclically, so that common features of the kinds are tested in all their forms."""
    kinds = defaultdict[object, list[Case]](list)
    for case in cases:
        kinds[kind(case)].append(case)
    return [
        _form(case, default=index == number % len(alike))
        for number, alike in enumerate(kinds.values())
        for index, case in enumerate(alike)
    ]


def each_value_once(*axes: Iterable[object]) -> list[ParameterSet]:
    """All combinations of the axes' values; by default only as many as are needed to include each value once."""
    values: list[Sequence[object]] = [list(axis) for axis in axes]
    covering = {tuple(turn % len(axis) for axis in values) for turn in range(max(map(len, values)))}
    return [
        _form(*(axis[index] for axis, index in zip(values, indices, strict=True)), default=indices in covering)
        for indices in product(*(range(len(axis)) for axis in values))
    ]


def _form(*values: object, default: bool = True) -> ParameterSet:
    return pytest.param(*values, marks=[] if default else [pytest.mark.long])
