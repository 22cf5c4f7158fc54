"""Composition methods: a name and a pure function. What each may be told is in composer/settings.py."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import isfinite

from composer.checks import structural
from composer.delta import Additive, Delta, Replacement
from composer.errors import Mismatch
from composer.formats.naming import is_head
from composer.methods.linear import linear, stack
from composer.settings import effective_weights, parse_settings
from composer.variants import LoadedAdapter, refuse_errors

Method = Callable[[Sequence[tuple[Additive, float]], float, Mapping[str, object]], list[Additive]]
"""The deltas of one place with their weights, the sum of all adapters' weights, settings -> what is added there."""

METHODS: dict[str, Method] = {"stack": stack, "linear": linear}


def combine_deltas(
    adapters: Sequence[LoadedAdapter],
    weights: Sequence[float],
    method: str = "stack",
    settings: Mapping[str, object] | None = None,
) -> list[Delta]:
    """The deltas of all adapters combined by the method, place by place; replacements are taken over.

    With tied=untie the head's delta names a tensor of its own (`<module>.weight`). Raises Mismatch for a hard
    conflict and for a weight that is not finite or scales a replacement; NotSupported for an unknown method or
    setting.
    """
    parsed = parse_settings(method, settings or {})
    if len(adapters) != len(weights) or not adapters:
        raise Mismatch("weights", f"{len(adapters)} adapters have {len(weights)} weights.", subject="weights")
    if not all(isfinite(weight) for weight in weights):
        raise Mismatch("weights", "A weight is not a finite number.", subject="weights")
    refuse_errors("These adapters cannot be combined", structural(adapters, parsed))
    places: dict[tuple[str, int], list[tuple[Additive, float]]] = defaultdict(list)
    replaced: dict[str, Delta] = {}
    effective = effective_weights(weights, method, parsed)
    for adapter, weight, factor in zip(adapters, weights, effective, strict=True):
        for found in adapter.deltas:
            delta = untied(found) if parsed["tied"] == "untie" else found
            if isinstance(delta, Replacement):
                _refuse_scaled(adapter.name, delta, factor)
                replaced[delta.weight] = delta
            else:
                places[delta.weight, delta.begin].append((delta, weight))
    combined = [delta for parts in places.values() for delta in METHODS[method](parts, sum(weights), parsed)]
    return [*replaced.values(), *combined]


def untied(delta: Delta) -> Delta:
    """The delta of a tied output head, addressed to a tensor of its own; every other delta as it is."""
    return replace(delta, weight=f"{delta.module}.weight") if delta.tied and is_head(delta.module) else delta


def _refuse_scaled(name: str, delta: Replacement, weight: float) -> None:
    if weight != 1:
        message = f"{name} saves {delta.weight} whole, which the effective weight {weight:g} cannot scale."
        next_step = "Give this adapter the weight 1, with lambda and normalize counted in."
        raise Mismatch("weighted_replacement", message, subject=delta.module, next_step=next_step)
