"""All adapters of a set compared: module by module, by layer, and in the whole model."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from composer.deltas.delta import LowRank, RowwiseDelta, names_of
from composer.deltas.lowrank import Relations, relations
from composer.deltas.tensors import all_finite
from composer.deltas.variants.load import LoadedAdapter
from composer.formats.recipes.weights import Weight, layer_of
from composer.methods.spectral import decomposing

Place = tuple[str, int]
"""A module, and the first row of the delta in its weight: the experts of a stack are places of their own."""


@dataclass(frozen=True, slots=True)
class Compared:
    """`places` holds what can be compared, one delta or None an adapter; `touched` the modules of each adapter.
    `factored` says that every adapter consists of factors, as some methods want."""

    names: Sequence[str]
    weights: Sequence[Weight]
    places: Mapping[Place, Sequence[LowRank | None]]
    modules: Mapping[str, Relations]
    layers: Mapping[int, Relations]
    total: Relations
    touched: Sequence[frozenset[str]]
    factored: bool


def compare_all(adapters: Sequence[LoadedAdapter], weights: Sequence[Weight]) -> Compared:
    """`weights` are what the deltas are multiplied by in the end. What is not finite, or has no factors, or two shapes
    at one place, is left out: other checks name it. Raises NotSupported for numbers too large to be compared."""
    places = _places(adapters)
    modules: dict[str, Relations] = {}
    # One after the other: the work is many small calls, and two of Python's threads were no faster than one.
    for (module, _), deltas in places.items():
        names = names_of(next(delta for delta in deltas if delta))
        with decomposing(module):
            one = relations(deltas, [weight.of(*names) for weight in weights])
        modules[module] = modules[module] + one if module in modules else one
    nothing = Relations.zero(len(adapters))
    layers: dict[int, Relations] = {}
    for module, one in modules.items():
        layer = layer_of(module)
        if layer is not None:
            layers[layer] = layers.get(layer, nothing) + one
    touched = [
        frozenset(module for (module, _), deltas in places.items() if deltas[index] is not None)
        for index in range(len(adapters))
    ]
    return Compared(
        [adapter.name for adapter in adapters],
        weights,
        places,
        modules,
        dict(sorted(layers.items())),
        sum(modules.values(), nothing),
        touched,
        not any(isinstance(delta, RowwiseDelta) for adapter in adapters for delta in adapter.deltas),
    )


def finite(delta: LowRank) -> bool:
    return all_finite(delta.A_RI) and all_finite(delta.B_OR)


def _places(adapters: Sequence[LoadedAdapter]) -> dict[Place, list[LowRank | None]]:
    places: dict[Place, list[LowRank | None]] = defaultdict(lambda: [None] * len(adapters))
    for index, adapter in enumerate(adapters):
        for delta in adapter.deltas:
            if isinstance(delta, LowRank) and finite(delta):
                places[delta.module, delta.begin][index] = delta
    # Deltas of different shapes have no inner product; `structural` refuses them with both shapes named.
    return {place: deltas for place, deltas in places.items() if len({one.stored_shape for one in deltas if one}) == 1}
