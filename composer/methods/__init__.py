"""Composition methods: a name, a pure function, and the settings it knows."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import isfinite

from composer.checks import structural
from composer.delta import Delta, LowRank, Replacement
from composer.errors import Mismatch, NotSupported
from composer.formats.naming import is_head
from composer.methods.linear import linear, stack
from composer.variants import LoadedAdapter, refuse_errors

Method = Callable[[Sequence[tuple[LowRank, float]], float, Mapping[str, object]], LowRank]

METHODS: dict[str, Method] = {"stack": stack, "linear": linear}


def _real(value: object) -> float:
    number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else float("nan")
    if not isfinite(number):
        raise ValueError("a finite number")
    return number


def _truth(value: object) -> bool:
    truths = {"true": True, "false": False}
    if str(value).lower() not in truths:
        raise ValueError("true or false")
    return truths[str(value).lower()]


def _tied(value: object) -> str:
    if value not in ("refuse", "shared", "untie"):
        raise ValueError("refuse, shared or untie")
    return str(value)


_Setting = tuple[object, Callable[[object], object]]  # default, parser
_EVERY_METHOD: dict[str, _Setting] = {"lambda": (1.0, _real), "tied": ("refuse", _tied)}
SETTINGS: dict[str, dict[str, _Setting]] = {
    "stack": _EVERY_METHOD,
    "linear": {**_EVERY_METHOD, "normalize": (False, _truth)},
}


def parse_settings(method: str, settings: Mapping[str, object]) -> dict[str, object]:
    """Settings of a method, complete and typed. Values may be text, as a command line has them.

    Raises NotSupported for an unknown method, setting or value, naming the known ones.
    """
    if method not in METHODS:
        raise NotSupported(
            "unknown_method",
            f"There is no method {method!r}.",
            subject=method,
            next_step=f"Use one of {', '.join(METHODS)}.",
        )
    known = SETTINGS[method]
    parsed = {name: default for name, (default, _) in known.items()}
    for name, value in settings.items():
        if name not in known:
            message = f"{method} has no setting {name!r}."
            raise NotSupported(
                "unknown_setting", message, subject=name, next_step=f"It knows {', '.join(sorted(known))}."
            )
        try:
            parsed[name] = known[name][1](value)
        except ValueError as error:
            message = f"The setting {name} is {value!r}."
            raise NotSupported("bad_setting", message, subject=name, next_step="Give another value.") from error
    return parsed


def combine_deltas(
    adapters: Sequence[LoadedAdapter],
    weights: Sequence[float],
    method: str = "stack",
    settings: Mapping[str, object] | None = None,
) -> dict[str, Delta]:
    """One delta a weight: low-rank pairs combined by the method, replacements taken over. Keys are checkpoint tensors.

    With tied=untie the head's delta is keyed by its own tensor's name (`<module>.weight`). Raises Mismatch for a hard
    conflict and for a weight that is not finite or scales a replacement; NotSupported for an unknown method or
    setting.
    """
    parsed = parse_settings(method, settings or {})
    if len(adapters) != len(weights) or not adapters:
        raise Mismatch("weights", f"{len(adapters)} adapters have {len(weights)} weights.", subject="weights")
    if not all(isfinite(weight) for weight in weights):
        raise Mismatch("weights", "A weight is not a finite number.", subject="weights")
    refuse_errors("These adapters cannot be combined", structural(adapters, parsed))
    low_rank: dict[str, list[tuple[LowRank, float]]] = defaultdict(list)
    combined: dict[str, Delta] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for found in adapter.deltas:
            delta = untied(found) if parsed["tied"] == "untie" else found
            if isinstance(delta, Replacement):
                _refuse_scaled(adapter.name, delta, weight)
                combined[delta.weight] = delta
            else:
                low_rank[delta.weight].append((delta, weight))
    for name, parts in low_rank.items():
        combined[name] = METHODS[method](parts, sum(weights), parsed)
    return combined


def untied(delta: Delta) -> Delta:
    """The delta of a tied output head, addressed to a tensor of its own; every other delta as it is."""
    return replace(delta, weight=f"{delta.module}.weight") if delta.tied and is_head(delta.module) else delta


def _refuse_scaled(name: str, delta: Replacement, weight: float) -> None:
    if weight != 1:
        message = f"{name} saves {delta.weight} whole, which the weight {weight:g} cannot scale."
        raise Mismatch(
            "weighted_replacement", message, subject=delta.module, next_step="Give this adapter the weight 1."
        )
