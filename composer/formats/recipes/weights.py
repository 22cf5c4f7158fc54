"""The weight of an adapter: one number, with other numbers for some layers or modules. No torch."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import isfinite
from typing import Annotated, Any, Self, TypedDict, TypeVar, cast

from pydantic import Field, ValidationError, model_validator

from composer.errors import Mismatch, NotSupported
from composer.formats.recipes.documents import LISTED, Document, ParsedBy, RefusedValues, problem_of
from composer.formats.untrusted import printable

MAX_RULES = 100
LARGEST = 1e12
"""Maximum factor: float32 ends at 3.4e38, which squares and products of such factors reach."""
_SMALLEST_SUM = 1e-8
_LAYER = re.compile(r"\.([0-9]{1,6})\.")
_IN_EVERY_TOWER = frozenset({"model", "base_model", "transformer", "layers", "layer", "h", "block", "blocks"})
_RANGE = re.compile(r"([0-9]{1,6})(?:-([0-9]{1,6}))?")
_GLOB = re.compile(r"[\w.*?\[\]!-]{1,200}")


def real(value: object) -> float:
    """Parses a finite number, also from text. Raises ValueError for everything else."""
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
    """Parses a number that deltas can be multiplied by. Raises ValueError for everything else."""
    number = real(value)
    if abs(number) > LARGEST:
        raise ValueError(f"a number of at most {LARGEST:g} in magnitude")
    return number


def layer_of(module: str) -> int | None:
    """The layer number of a module path: the first number in it."""
    match = _LAYER.search(f"{module}.")
    return int(match[1]) if match else None


def tower_of(module: str) -> str:
    """The path before the layer number, which tells a vision tower's layer 0 from a language model's; empty without a
    layer."""
    match = _LAYER.search(f"{module}.")
    return module[: match.start()] if match else ""


def tower_name(tower: str) -> str:
    """The particular part of a tower's path: `vision_tower.encoder` of `model.vision_tower.encoder.layers`."""
    return ".".join(part for part in tower.split(".") if part not in _IN_EVERY_TOWER)


def tower_labels(modules: Iterable[str]) -> dict[str, str]:
    """A short label for the tower of each module that is in a layer: what distinguishes it from the others, empty for
    a single tower. `model.vision_tower.encoder.layers` and `model.language_model.layers` are `vision_tower` and
    `language_model`."""
    towers = {tower for module in modules if (tower := tower_of(module))}
    labels = {tower: tower_name(tower) for tower in towers}
    different = set(labels.values())
    if len(different) < 2:
        return dict.fromkeys(towers, "")
    short = {label: label.partition(".")[0] for label in different}
    return {tower: short[own] if len(set(short.values())) == len(different) else own for tower, own in labels.items()}


def _layers(value: object) -> tuple[int, int]:
    match = _RANGE.fullmatch(str(value)) if isinstance(value, str | int) and not isinstance(value, bool) else None
    first = int(match[1]) if match else 0
    last = int(match[2] or match[1]) if match else -1
    if last < first:
        raise ValueError("a range of layers, as 0-9, or 3")
    return first, last


def _glob(value: object) -> str:
    if not isinstance(value, str) or not _GLOB.fullmatch(value):
        raise ValueError("a glob of module names")
    return value


Factor = Annotated[float, ParsedBy(factor, {"type": "number", "minimum": -LARGEST, "maximum": LARGEST})]
Layers = Annotated[
    tuple[int, int],
    ParsedBy(
        _layers, {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": f"^{_RANGE.pattern}$"}]}
    ),
]
Modules = Annotated[str, ParsedBy(_glob, {"type": "string"})]


class _RuleSelector(TypedDict, total=False):
    layers: str
    modules: str


class RuleDocument(_RuleSelector):
    """A `WeightRule`."""

    weight: float


class RulesPart(TypedDict, total=False):
    """The rules in a recipe's or a lock's document, which lacks them if there are none."""

    rules: list[RuleDocument]


class WeightRule(Document):
    """A rule: `weight` replaces the adapter's own in these layers (first and last) and in modules that match the glob.
    A glob matches the full path or an end of it after a dot: `q_proj`, `mlp.*`, `model.layers.3.*`."""

    weight: Factor
    layers: Layers | None = Field(None, description="The first and the last layer: 0-9, or 3.")
    modules: Modules | None = Field(None, description="A glob of module names: q_proj, mlp.*, model.layers.3.*")

    @model_validator(mode="after")
    def _refuse_empty(self) -> Self:
        if not self.model_fields_set & {"layers", "modules"}:
            raise RefusedValues("it needs layers or modules")
        return self

    def holds(self, module: str) -> bool:
        """Whether the module is in the rule's layers and matches its glob."""
        if self.layers is not None:
            layer = layer_of(module)
            if layer is None or not self.layers[0] <= layer <= self.layers[1]:
                return False
        return self.modules is None or fnmatchcase(module, self.modules) or fnmatchcase(module, f"*.{self.modules}")

    def towers(self, modules: Iterable[str]) -> list[str]:
        """The towers among whose layers the rule does not choose; empty if it has no layers, names a tower, or begins
        its glob with `*`, which means all of them."""
        if self.layers is None or (self.modules or "").startswith("*"):
            return []
        towers = sorted({tower_of(module) for module in modules if self.holds(module)})
        return towers if len(towers) > 1 else []

    def to_json(self) -> RuleDocument:
        selector: _RuleSelector = {}
        if self.layers is not None:
            selector["layers"] = f"{self.layers[0]}-{self.layers[1]}"
        if self.modules is not None:
            selector["modules"] = self.modules
        return {**selector, "weight": self.weight}


def rules_json(rules: Sequence[WeightRule]) -> RulesPart:
    """The rules for a document; empty if there are none, so that a lock without them keeps its digest."""
    return {"rules": [rule.to_json() for rule in rules]} if rules else {}


@dataclass(frozen=True, slots=True)
class Weight:
    """The weight of a module: that of the first rule that matches one of its names, otherwise `value`."""

    value: float = 1.0
    rules: tuple[WeightRule, ...] = ()

    def of(self, *names: str) -> float:
        return next((rule.weight for rule in self.rules if any(map(rule.holds, names))), self.value)

    def times(self, factor: float) -> "Weight":
        """The weight and its rules, multiplied by a factor."""
        rules = tuple(rule.model_copy(update={"weight": rule.weight * factor}) for rule in self.rules)
        return Weight(self.value * factor, rules)

    def to_json(self) -> float | dict[str, Any]:
        """The weight for a document: a plain number unless it has rules."""
        if not self.rules:
            return self.value
        return {"value": self.value, "rules": [rule.to_json() for rule in self.rules]}


@dataclass(frozen=True, slots=True)
class NormalizedWeight(Weight):
    """A weight over the sum of all weights `among`, module by module."""

    among: tuple[Weight, ...] = ()

    def of(self, *names: str) -> float:
        """The weight of a module. Raises Mismatch if the weights cancel."""
        own = Weight.of(self, *names)
        return own / divisor(sum(weight.of(*names) for weight in self.among)) if own else 0.0

    def times(self, factor: float) -> "NormalizedWeight":
        plain = Weight.times(self, factor)
        return NormalizedWeight(plain.value, plain.rules, self.among)

    def to_json(self) -> float | dict[str, Any]:
        """The weight for a document: the quotient; with rules, the weight and the weights `among` which it is divided,
        since modules differ."""
        if not any(weight.rules for weight in (self, *self.among)):
            return self.of()
        rules = [rule.to_json() for rule in self.rules]
        return {"value": self.value, "rules": rules, "among": [weight.to_json() for weight in self.among]}


def divisor(total: float) -> float:
    """The sum of the weights, as a divisor. Raises Mismatch if it is zero."""
    if abs(total) < _SMALLEST_SUM:
        message = f"The weights add up to {total:g}; a mean over them does not exist."
        raise Mismatch("zero_weight_sum", message, subject="weights")
    return total


Rules = Annotated[tuple[WeightRule, ...], Field(max_length=MAX_RULES), LISTED]


class _WeightDocument(Document):
    value: Factor = 1.0
    rules: Rules = ()


def parse_weight(value: object) -> Weight:
    """Parses a number, or {value: number, rules: [{layers: "0-9", modules: glob, weight: number}]}. Raises NotSupported
    naming what is wrong."""
    if isinstance(value, Weight):
        return value
    document = cast("dict[object, object]", value) if isinstance(value, dict) else {"value": value}
    parsed = _validated(_WeightDocument, document)
    return Weight(parsed.value, parsed.rules)


def weights_of(values: Sequence[Weight | float]) -> list[Weight]:
    """The weights as `Weight`, from numbers or weights."""
    return [parse_weight(value) for value in values]


def parse_rule(text: str) -> WeightRule:
    """Parses `SELECTOR=WEIGHT` from a command line, for layers (`0-9`, `3`), a glob of modules, or both
    (`0-9/mlp.*`).
    """
    selector, equals, weight = text.rpartition("=")
    layers, slash, modules = selector.partition("/")
    if not slash and not _RANGE.fullmatch(selector):
        layers, modules = "", selector
    if not equals or not selector or (slash and not (layers and modules)):
        raise _bad(f"{printable(text)} is not a rule; write 0-9=0.5, q_proj=0 or 0-9/mlp.*=0.5")
    row = {"weight": weight} | ({"layers": layers} if layers else {}) | ({"modules": modules} if modules else {})
    return _validated(WeightRule, row)


_D = TypeVar("_D", bound=Document)


def _validated(model: type[_D], document: object) -> _D:
    try:
        return model.model_validate(document)
    except ValidationError as error:
        problem = problem_of(error)
        raise _bad(f"{problem.path}: {problem.why}".removeprefix(": ")) from error


def _bad(why: str) -> NotSupported:
    return NotSupported(
        "bad_weight",
        f"A weight cannot be read: {why}.",
        subject="weight",
        next_step="Write a number, or {value: 1, rules: [...]}.",
    )
