"""How strongly an adapter takes part: one number, with other numbers for some layers or modules. No torch."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import isfinite
from typing import Any, cast

from composer.errors import Mismatch, NotSupported
from composer.formats.untrusted import printable

MAX_RULES = 100
LARGEST = 1e12
"""Of a factor: computing in float32 ends at 3.4e38, which squares and products of some reach."""
_SMALLEST_SUM = 1e-8
_LAYER = re.compile(r"\.([0-9]{1,6})\.")
_RANGE = re.compile(r"([0-9]{1,6})(?:-([0-9]{1,6}))?")
_GLOB = re.compile(r"[\w.*?\[\]!-]{1,200}")


def real(value: object) -> float:
    """A finite number, also one spelled as text. Raises ValueError, saying so, for everything else."""
    if isinstance(value, str) and ("_" in value or not value.isascii()):  # Python reads 1_0, and digits of any script
        raise ValueError("a finite number")
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else float("nan")
    except (OverflowError, ValueError) as error:
        raise ValueError("a finite number") from error
    if not isfinite(number):
        raise ValueError("a finite number")
    return number


def factor(value: object) -> float:
    """A number that deltas can be multiplied by. Raises ValueError, saying so, for everything else."""
    number = real(value)
    if abs(number) > LARGEST:
        raise ValueError(f"a number of at most {LARGEST:g} in size")
    return number


def layer_of(module: str) -> int | None:
    """The number of the layer that a module path lies in: the first number in it."""
    match = _LAYER.search(f"{module}.")
    return int(match[1]) if match else None


@dataclass(frozen=True, slots=True)
class WeightRule:
    """`weight` takes the adapter's own place in these layers (first and last) and in modules that the glob names.

    A glob is matched with the whole path or with an end of it at a dot: `q_proj`, `mlp.*`, `model.layers.3.*`.
    """

    weight: float
    layers: tuple[int, int] | None = None
    modules: str | None = None

    def holds(self, module: str) -> bool:
        if self.layers is not None:
            layer = layer_of(module)
            if layer is None or not self.layers[0] <= layer <= self.layers[1]:
                return False
        return self.modules is None or fnmatchcase(module, self.modules) or fnmatchcase(module, f"*.{self.modules}")

    def to_json(self) -> dict[str, Any]:
        layers = {} if self.layers is None else {"layers": f"{self.layers[0]}-{self.layers[1]}"}
        modules = {} if self.modules is None else {"modules": self.modules}
        return {**layers, **modules, "weight": self.weight}


@dataclass(frozen=True, slots=True)
class Weight:
    """`value`, except where a rule holds for one of the names: the first one that does decides."""

    value: float = 1.0
    rules: tuple[WeightRule, ...] = ()

    def of(self, *names: str) -> float:
        return next((rule.weight for rule in self.rules if any(map(rule.holds, names))), self.value)

    def times(self, factor: float) -> "Weight":
        rules = tuple(WeightRule(rule.weight * factor, rule.layers, rule.modules) for rule in self.rules)
        return Weight(self.value * factor, rules)

    def to_json(self) -> float | dict[str, Any]:
        """A number where there are no rules: what most recipes say."""
        if not self.rules:
            return self.value
        return {"value": self.value, "rules": [rule.to_json() for rule in self.rules]}


@dataclass(frozen=True, slots=True)
class NormalizedWeight(Weight):
    """A weight over the sum of all weights `among`, module by module."""

    among: tuple[Weight, ...] = ()

    def of(self, *names: str) -> float:
        """Raises Mismatch where the weights cancel."""
        own = Weight.of(self, *names)
        return own / divisor(sum(weight.of(*names) for weight in self.among)) if own else 0.0

    def times(self, factor: float) -> "NormalizedWeight":
        plain = Weight.times(self, factor)
        return NormalizedWeight(plain.value, plain.rules, self.among)

    def to_json(self) -> float | dict[str, Any]:
        """What it comes to; with rules, what has to be divided and `among` which weights, since modules differ."""
        if not any(weight.rules for weight in (self, *self.among)):
            return self.of()
        rules = [rule.to_json() for rule in self.rules]
        return {"value": self.value, "rules": rules, "among": [weight.to_json() for weight in self.among]}


def divisor(total: float) -> float:
    """The sum of the weights as something to divide by. Raises Mismatch when it is nothing."""
    if abs(total) < _SMALLEST_SUM:
        message = f"The weights add up to {total:g}; a mean over them does not exist."
        raise Mismatch("zero_weight_sum", message, subject="weights", next_step="Change a weight, or take the sum.")
    return total


def parse_weight(value: object) -> Weight:
    """A number, or {value: number, rules: [{layers: "0-9", modules: glob, weight: number}]}.

    Raises NotSupported naming what is wrong.
    """
    if isinstance(value, Weight):
        return value
    if not isinstance(value, dict):
        return Weight(_number(value))
    given = _known(cast("dict[object, object]", value), {"value", "rules"})
    rules = given.get("rules", [])
    if not isinstance(rules, list) or len(cast("list[object]", rules)) > MAX_RULES:
        raise _bad(f"rules are a list of at most {MAX_RULES}")
    return Weight(_number(given.get("value", 1.0)), tuple(_rule(row) for row in cast("list[object]", rules)))


def weights_of(values: Sequence[Weight | float]) -> list[Weight]:
    """As Weight, whatever they came as."""
    return [parse_weight(value) for value in values]


def parse_rule(text: str) -> WeightRule:
    """`SELECTOR=WEIGHT` of a command line, for layers (`0-9`, `3`), a glob of modules, or both (`0-9/mlp.*`)."""
    selector, equals, weight = text.rpartition("=")
    layers, slash, modules = selector.partition("/")
    if not slash and not _RANGE.fullmatch(selector):
        layers, modules = "", selector
    if not equals or not selector or (slash and not (layers and modules)):
        raise _bad(f"{printable(text)} is no rule; write 0-9=0.5, q_proj=0 or 0-9/mlp.*=0.5")
    row: dict[str, object] = {"weight": weight}
    return _rule(row | ({"layers": layers} if layers else {}) | ({"modules": modules} if modules else {}))


def _rule(row: object) -> WeightRule:
    if not isinstance(row, dict):
        raise _bad("a rule is a mapping of layers, modules and weight")
    given = _known(cast("dict[object, object]", row), {"layers", "modules", "weight"})
    if "weight" not in given or not given.keys() & {"layers", "modules"}:
        raise _bad("a rule has a weight, and layers or modules that it is for")
    modules = given.get("modules")
    if modules is not None and (not isinstance(modules, str) or not _GLOB.fullmatch(modules)):
        raise _bad(f"{printable(modules)} is no glob of module names")
    return WeightRule(_number(given["weight"]), _layers(given.get("layers")), modules)


def _layers(value: object) -> tuple[int, int] | None:
    if value is None:
        return None
    match = _RANGE.fullmatch(str(value)) if isinstance(value, str | int) and not isinstance(value, bool) else None
    first = int(match[1]) if match else 0
    last = int(match[2] or match[1]) if match else -1
    if last < first:
        raise _bad(f"{printable(value)} is no range of layers; write 0-9, or 3")
    return first, last


def _known(given: Mapping[object, object], known: set[str]) -> dict[str, object]:
    for key in given:
        if key not in known:
            raise _bad(f"{printable(key)} is none of {', '.join(sorted(known))}")
    return cast("dict[str, object]", dict(given))


def _number(value: object) -> float:
    try:
        return factor(value)
    except ValueError as error:
        raise _bad(f"{printable(value)} is not {error}") from error


def _bad(why: str) -> NotSupported:
    return NotSupported(
        "bad_weight",
        f"A weight cannot be read: {why}.",
        subject="weight",
        next_step="Write a number, or {value: 1, rules: [...]}.",
    )
