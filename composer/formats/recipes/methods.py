"""The methods by name, as pipelines of five steps, and their settings. No torch: a recipe is checked before any work.

calibrate -> space -> sparsify -> combine -> compress: a method is a choice of the five (composer/methods has the math).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, Self, cast

from pydantic import Field, ValidationError, ValidationInfo, create_model, field_validator

from composer.errors import NotSupported
from composer.formats.recipes.documents import Document, ParsedBy, problem_of
from composer.formats.recipes.weights import Factor, NormalizedWeight, Weight, real, weights_of
from composer.formats.untrusted import printable


@dataclass(frozen=True, slots=True)
class Pipeline:
    """The steps of a method.

    `space`: factors (side by side, exact), full (every entry of each delta), core, knots or ctm (a small shared basis).
    `compress`: to the highest rank of the inputs if neither rank nor energy is set. `parity` is PEFT's
    `combination_type`, whose values are reproduced exactly. `fitted`: the factors are first fitted on the modules'
    inputs (composer/methods/regmean.py). `version` is raised when the same inputs give other numbers, so that results
    of earlier versions are recognized.
    """

    space: str = "factors"
    sparsify: str = "none"
    combine: str = "sum"
    calibrate: str = "none"
    compress: bool = False
    parity: str = ""
    fitted: bool = False
    version: int = 1

    @property
    def random(self) -> bool:
        return self.sparsify in ("dare", "della")


def _truth(value: object) -> bool:
    truths = {"true": True, "false": False}
    word = str(value).lower() if isinstance(value, bool | str) else ""
    if word not in truths:
        raise ValueError("true or false")
    return truths[word]


def _order(value: object) -> bool | str:
    try:
        return "active" if value == "active" else _truth(value)
    except ValueError as error:
        raise ValueError("one of true, false and active") from error


def _number(expected: str, holds: Callable[[float], bool], **schema: float) -> ParsedBy:
    def parse(value: object) -> float:
        try:
            number = real(value)
        except ValueError as error:
            raise ValueError(expected) from error
        if not holds(number):
            raise ValueError(expected)
        return number

    return ParsedBy(parse, {"type": "number", **schema})


def _integer(least: int, most: int) -> ParsedBy:
    expected = f"a whole number from {least} to {most}"
    number = _number(expected, lambda number: number == int(number) and least <= number <= most)

    def parse(value: object) -> int:
        if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 20:
            value = int(value)
        parsed = cast(float, number.read(value))  # which cannot represent every integer above 2^53
        if isinstance(value, int) and value > most:
            raise ValueError(expected)
        return int(parsed)

    return ParsedBy(parse, {"type": "integer", "minimum": least, "maximum": most})


_POSITION = _integer(1, 1000)


def _positions(value: object) -> tuple[int, ...]:
    listed: object = value.split(",") if isinstance(value, str) else value
    try:
        each = cast("Sequence[object]", listed) if isinstance(listed, list | tuple) else [listed]
        return tuple(cast(int, _POSITION.read(position)) for position in each)
    except ValueError as error:
        raise ValueError("the numbers of inputs, counted from 1: 1, or 1,3") from error


Order = Annotated[bool | str, ParsedBy(_order, {"enum": [False, True, "active"]})]
Truth = Annotated[bool, ParsedBy(_truth, {"type": "boolean"})]
Share = Annotated[
    float, _number("a number above 0, at most 1", lambda number: 0 < number <= 1, exclusiveMinimum=0, maximum=1)
]
BelowOne = Annotated[
    float, _number("a number from 0 to below 1", lambda number: 0 <= number < 1, minimum=0, exclusiveMaximum=1)
]
Ridge = Annotated[
    float, _number("a number from 1e-6 to 1e6", lambda number: 1e-6 <= number <= 1e6, minimum=1e-6, maximum=1e6)
]
GuardWeight = Annotated[
    float, _number("a number from 0 to 1000", lambda number: 0 <= number <= 1000, minimum=0, maximum=1000)
]
Rank = Annotated[int, _integer(1, 65_536)]
Seed = Annotated[int, _integer(0, 2**53)]
Positions = Annotated[
    tuple[int, ...],
    ParsedBy(
        _positions, {"anyOf": [_POSITION.schema, {"type": "array", "items": _POSITION.schema}, {"type": "string"}]}
    ),
]
Tied = Literal["auto", "untie", "shared", "refuse"]


class MethodSettings(Document):
    """The settings of every method. Each method has a subclass, composed from the settings of its steps, with its name
    and its pipeline."""

    method: ClassVar[str]
    pipeline: ClassVar[Pipeline]

    factor: Factor = Field(1.0, alias="lambda", description="Multiplies the result.")
    tied: Tied = Field("auto", description="The treatment of a tensor that is both output head and input embedding.")
    replacements: Literal["refuse", "delta"] = Field(
        "refuse", description="Whether tensors that an adapter saves in full are refused where they cannot be copied."
    )

    @property
    def version(self) -> int:
        """The version of the method with these settings."""
        return self.pipeline.version

    @property
    def divides(self) -> bool:
        """Whether the sum is divided by the sum of the weights."""
        return self.pipeline.combine == "mean"

    @property
    def in_order(self) -> bool:
        """Whether the adapters are applied one after the other."""
        return False

    @property
    def as_active(self) -> bool:
        """Whether they are applied as PEFT applies adapters that are active together."""
        return False

    @property
    def cuts(self) -> bool:
        """Whether a rank or a share of the energy is set."""
        return False

    @property
    def alters(self) -> bool:
        """Whether deltas are truncated or projected before they are added."""
        return self.cuts

    def with_tied(self, tied: Tied) -> Self:
        """A copy with this handling of tied weights."""
        return self.model_copy(update={"tied": tied})

    def to_json(self) -> dict[str, Any]:
        """All settings, in the form of notes and locks."""
        return self.model_dump(by_alias=True)


class Compressed(MethodSettings):
    """Settings of methods whose result can be truncated to a rank."""

    rank: Rank | None = Field(None, description="The most directions that are kept.")
    energy: Share | None = Field(None, description="The share of |Δ|² that is kept.")

    @property
    def cuts(self) -> bool:
        """Whether the result is truncated."""
        return self.rank is not None or self.energy is not None


class Combined(Compressed):
    """Settings of Adaptory's own methods, which are made of steps."""

    protect: Positions = Field((), description="The inputs that the others leave alone, counted from 1.")
    protect_side: Literal["both", "input", "output"] = "both"

    @property
    def alters(self) -> bool:
        return self.cuts or bool(self.protect)

    def with_protected(self, positions: Sequence[int]) -> Self:
        return self.model_copy(update={"protect": tuple(positions)})


class Sum(Combined):
    """Settings of the plain sum."""

    sequential: Order = Field(
        False, description="Whether the adapters are applied one after the other; `active`: as PEFT's active adapters."
    )

    @property
    def in_order(self) -> bool:
        return bool(self.sequential)

    @property
    def as_active(self) -> bool:
        return self.sequential == "active"

    def to_json(self) -> dict[str, Any]:
        """All settings, without a false `sequential`, so that locks keep the digests that they had before that setting
        existed."""
        document = super().to_json()
        return document if self.sequential else {name: document[name] for name in document if name != "sequential"}


class Linear(Sum):
    normalize: Truth = Field(False, description="Whether the sum is divided by the sum of the weights.")

    @property
    def divides(self) -> bool:
        return self.normalize


class Restoring(MethodSettings):
    restore: Literal["merged", "each", "none"] = Field("merged", description="The reference whose norm is restored.")


class Gauged(MethodSettings):
    """`canonical` splits each delta into factors again, so that nothing depends on the split in its file."""

    gauge: Literal["canonical", "raw"] = "canonical"


class Pico(Gauged, Restoring):
    pass


class Knots(MethodSettings):
    side: Literal["output", "input"] = "output"


class Ctm(MethodSettings):
    ctm_rank: Rank | None = Field(
        None, description="The rank of the bases; if not set, the rank, or the highest of the inputs."
    )
    beta: BelowOne = Field(0.0, description="The influence of a delta's size on the choice of the bases.")


class Magnitude(MethodSettings):
    density: Share = Field(0.2, description="The share of the entries that is kept.")
    scope: Literal["tensor", "model"] = Field(
        "tensor", description="The scope from which the largest entries are chosen."
    )


class Dare(MethodSettings):
    density: Share = Field(0.5, description="The probability with which an entry is kept.")
    seed: Seed = 0


class Della(MethodSettings):
    density: Share = Field(0.5, description="The mean probability with which an entry is kept.")
    epsilon: BelowOne = Field(
        0.15, description="The spread of the probabilities around the mean.", validate_default=True
    )
    seed: Seed = 0

    @field_validator("epsilon")
    @classmethod
    def _check_probabilities(cls, epsilon: float, info: ValidationInfo) -> float:
        density = info.data.get("density")
        if density is not None and not epsilon < density < 1 - epsilon:
            raise ValueError("a number below density and 1 - density, so that density ± epsilon is a probability")
        return epsilon


class Breadcrumbs(MethodSettings):
    density: Share = Field(0.9, description="The share of the entries that is kept.")
    gamma: BelowOne = Field(0.01, description="The share of the largest entries, which are dropped.")


class Sce(MethodSettings):
    density: Share = Field(0.1, description="The share of the entries that is kept: those that vary most.")


class Elect(MethodSettings):
    vote: Literal["plain", "weighted", "count"] = Field(
        "plain", description="The way in which an entry's sign is elected."
    )
    divide: Literal["count", "weights", "none"] = Field("count", description="The divisor of the kept entries.")

    @property
    def version(self) -> int:
        """One higher for weighted votes, since negative weights counted otherwise before."""
        return self.pipeline.version + (self.vote == "weighted")


class _Fit(MethodSettings):
    examples: Annotated[int, _integer(1, 64)] = Field(4, description="Examples of each input's suite to fit on.")
    steps: Annotated[int, _integer(1, 2)] = 2
    ridge: Ridge = 0.01
    form: Literal["input", "core", "weights"] = "input"
    tokens: Annotated[int, _integer(16, 65_536)] = Field(2048, description="The most tokens to fit a module on.")
    guard: GuardWeight = Field(0.3, description="The weight of the guard suites' examples, on which nothing changes.")
    seed: Seed = 0


class Regmean(Compressed, _Fit):
    pass


class PeftCombination(MethodSettings):
    """Settings of PEFT's own combinations."""

    density: Share = 0.2
    rank: Rank | None = None
    seed: Seed = 0

    @property
    def cuts(self) -> bool:
        return self.rank is not None


AnySettings = Compressed | PeftCombination

_STEPS: dict[tuple[str, str], type[MethodSettings]] = {
    ("sparsify", "magnitude"): Magnitude,
    ("sparsify", "dare"): Dare,
    ("sparsify", "della"): Della,
    ("sparsify", "breadcrumbs"): Breadcrumbs,
    ("sparsify", "sce"): Sce,
    ("combine", "elect"): Elect,
    ("space", "core"): Gauged,
    ("space", "knots"): Knots,
    ("space", "ctm"): Ctm,
    ("calibrate", "pico"): Pico,
}

_FULL = {
    "ties": Pipeline("full", "magnitude", "elect"),
    "dare_linear": Pipeline("full", "dare"),
    "dare_ties": Pipeline("full", "dare", "elect"),
    "magnitude_prune": Pipeline("full", "magnitude"),
    "della": Pipeline("full", "della", "elect"),
    "della_linear": Pipeline("full", "della"),
    "breadcrumbs": Pipeline("full", "breadcrumbs"),
    "breadcrumbs_ties": Pipeline("full", "breadcrumbs", "elect"),
    "sce": Pipeline("full", "sce", "sce"),
}
_PLAIN = {
    "stack": Pipeline(),
    "linear": Pipeline(),
    "mean": Pipeline(combine="mean"),
    "svd": Pipeline("core", compress=True),
    **_FULL,
    **{f"{name}_svd": replace(pipeline, compress=True) for name, pipeline in _FULL.items()},
    "knots_ties": Pipeline("knots", "magnitude", "elect"),
    "knots_dare_ties": Pipeline("knots", "dare", "elect"),
    "core_ties": Pipeline("core", "magnitude", "elect"),
    "core_dare_ties": Pipeline("core", "dare", "elect"),
    **{f"{prefix}{step}": Pipeline("core", combine=step) for prefix in ("core_", "") for step in ("tsv", "iso")},
    "ctm_mean": Pipeline("ctm", combine="mean", version=2),
    "ctm_ties": Pipeline("ctm", "magnitude", "elect", version=2),
    "ctm_dare_ties": Pipeline("ctm", "dare", "elect", version=2),
}
_PEFT_TYPES = (
    "cat", "svd", "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune",
    "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd",
)  # fmt: skip
PIPELINES: dict[str, Pipeline] = {
    **_PLAIN,
    **{f"pico_{name}": replace(pipeline, calibrate="pico", version=2) for name, pipeline in _PLAIN.items()},
    **{f"peft_{name}": Pipeline(parity=name) for name in _PEFT_TYPES},
    "regmean": Pipeline(fitted=True, version=3),
}

METHOD_NAMES = ", ".join([*(name for name in PIPELINES if not name.startswith("pico_")), "pico_…"])
"""The names for a message, without those that Pico's calibration derives from the others."""


@cache
def settings_of(method: str) -> type[AnySettings]:
    """The settings class of a method, composed from those of its steps: the last step's first, since pydantic puts a
    first base's fields last. Raises KeyError for an unknown method."""
    pipeline = PIPELINES[method]
    if pipeline.parity:
        bases = [PeftCombination]
    elif pipeline.fitted:
        bases = [Regmean]
    else:
        steps = [(step, getattr(pipeline, step)) for step in ("combine", "sparsify", "space", "calibrate")]
        own = Linear if method == "linear" else Sum if pipeline == Pipeline() else Combined
        bases = [*(_STEPS[step] for step in steps if step in _STEPS), own]
    # Pico already has the gauge.
    bases = [base for base in bases if not any(issubclass(other, base) for other in bases if other is not base)]
    made = cast("type[AnySettings]", create_model(method, __base__=tuple(bases)))
    made.method, made.pipeline = method, pipeline
    return made


def parse_settings(method: str, settings: Mapping[str, object] | None = None) -> AnySettings:
    """Parses a method with its settings. Values may be text, as on a command line. Raises NotSupported for an unknown
    method, setting or value, naming the known ones."""
    if method not in PIPELINES:
        raise NotSupported(
            "unknown_method",
            f"Unknown method {printable(method)}.",
            subject=method,
            next_step=f"Use one of {METHOD_NAMES}.",
        )
    try:
        return settings_of(method).model_validate(dict(settings or {}))
    except ValidationError as error:
        problem = problem_of(error)
        if problem.unknown:
            name, message = str(problem.value), f"{method} has no setting {printable(problem.value)}."
            raise NotSupported("unknown_setting", message, subject=name, next_step=problem.next_step) from error
        message = f"The setting {problem.path} is {printable(problem.value)}."
        next_step = f"It is {problem.expected}."
        raise NotSupported("bad_setting", message, subject=problem.path, next_step=next_step) from error


def effective_weights(weights: Sequence[Weight | float], settings: MethodSettings) -> list[Weight]:
    """The factor of each adapter in a plain sum, including the method's own factors."""
    given = [weight.times(settings.factor) for weight in weights_of(weights)]
    if not settings.divides:
        return given
    among = tuple(weights_of(weights))
    return [NormalizedWeight(weight.value, weight.rules, among) for weight in given]
