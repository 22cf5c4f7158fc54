"""The methods by name, as pipelines of five steps, and their settings. No torch: a recipe is checked before any work.

calibrate -> space -> sparsify -> combine -> compress: a method is a choice of the five (composer/methods has the math).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

from composer.errors import NotSupported
from composer.formats.recipes.weights import NormalizedWeight, Weight, factor, real, weights_of
from composer.formats.untrusted import printable


@dataclass(frozen=True, slots=True)
class Pipeline:
    """`space`: factors (side by side, exact), full (every entry of each delta), core, knots or ctm (a small shared
    basis). `compress`: to the highest rank of the inputs where neither rank nor energy is set.

    `parity` is PEFT's `combination_type`, whose values are reproduced as they are. `fitted` says that the factors are
    first fitted on what the modules see (composer/methods/regmean.py). `version` is raised when the same inputs give
    other numbers, so that what an earlier one made is known as that.
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


_Parse = Callable[[object], object]
_Setting = tuple[object, _Parse]  # default, parser


def _truth(value: object) -> bool:
    truths = {"true": True, "false": False}
    word = str(value).lower() if isinstance(value, bool | str) else ""
    if word not in truths:
        raise ValueError("true or false")
    return truths[word]


def _one_of(*words: str) -> _Parse:
    def parse(value: object) -> str:
        if value not in words:
            raise ValueError(f"one of {', '.join(words)}")
        return str(value)

    return parse


def _number(expected: str, holds: Callable[[float], bool]) -> Callable[[object], float]:
    def parse(value: object) -> float:
        try:
            number = real(value)
        except ValueError as error:
            raise ValueError(expected) from error
        if not holds(number):
            raise ValueError(expected)
        return number

    return parse


_share = _number("a number above 0, at most 1", lambda number: 0 < number <= 1)
_below_one = _number("a number from 0 to below 1", lambda number: 0 <= number < 1)


def _whole(least: int, most: int) -> Callable[[object], int]:
    expected = f"a whole number from {least} to {most}"
    parse = _number(expected, lambda number: number == int(number) and least <= number <= most)

    def whole(value: object) -> int:
        if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 20:
            value = int(value)
        parsed = parse(value)  # a float, which has not every number above 2^53
        if isinstance(value, int) and value > most:
            raise ValueError(expected)
        return int(parsed)

    return whole


def _optional(parse: _Parse) -> _Parse:
    return lambda value: None if value is None else parse(value)


def _positions(value: object) -> tuple[int, ...]:
    listed: object = value.split(",") if isinstance(value, str) else value
    try:
        each = cast("Sequence[object]", listed) if isinstance(listed, list | tuple) else [listed]
        return tuple(map(_whole(1, 1000), each))
    except ValueError as error:
        raise ValueError("the numbers of inputs, counted from 1: 1, or 1,3") from error


_SEED: dict[str, _Setting] = {"seed": (0, _whole(0, 2**53))}
_GAUGE: dict[str, _Setting] = {"gauge": ("canonical", _one_of("canonical", "raw"))}
_EVERY: dict[str, _Setting] = {
    "lambda": (1.0, factor),
    "tied": ("auto", _one_of("auto", "untie", "shared", "refuse")),
    "replacements": ("refuse", _one_of("refuse", "delta")),
}
_OURS: dict[str, _Setting] = {
    "rank": (None, _optional(_whole(1, 65_536))),
    "energy": (None, _optional(_share)),
    "protect": ((), _positions),
    "protect_side": ("both", _one_of("both", "input", "output")),
}
_SEQUENTIAL: dict[str, _Setting] = {"sequential": (False, _truth)}
_LEFT_OUT = frozenset(_SEQUENTIAL)
"""At their defaults these are not there, so that locks have the digests that they had before there were such."""
_STEPS: dict[tuple[str, str], dict[str, _Setting]] = {
    ("sparsify", "magnitude"): {"density": (0.2, _share), "scope": ("tensor", _one_of("tensor", "model"))},
    ("sparsify", "dare"): {"density": (0.5, _share), **_SEED},
    ("sparsify", "della"): {"density": (0.5, _share), "epsilon": (0.15, _below_one), **_SEED},
    ("sparsify", "breadcrumbs"): {"density": (0.9, _share), "gamma": (0.01, _below_one)},
    ("sparsify", "sce"): {"density": (0.1, _share)},
    ("combine", "elect"): {
        "vote": ("plain", _one_of("plain", "weighted", "count")),
        "divide": ("count", _one_of("count", "weights", "none")),
    },
    ("space", "core"): _GAUGE,
    ("space", "knots"): {"side": ("output", _one_of("output", "input"))},
    ("space", "ctm"): {"ctm_rank": (None, _optional(_whole(1, 65_536))), "beta": (0.0, _below_one)},
    ("calibrate", "pico"): {"restore": ("merged", _one_of("merged", "each", "none")), **_GAUGE},
}
_FITTED: dict[str, _Setting] = {
    "examples": (4, _whole(1, 64)),
    "steps": (2, _whole(1, 2)),
    "ridge": (0.01, _number("a number from 1e-6 to 1e6", lambda number: 1e-6 <= number <= 1e6)),
    "form": ("input", _one_of("input", "core")),
    "tokens": (2048, _whole(16, 65_536)),
    **_SEED,
    "rank": _OURS["rank"],
    "energy": _OURS["energy"],
}
_PARITY: dict[str, _Setting] = {"density": (0.2, _share), "rank": (None, _optional(_whole(1, 65_536))), **_SEED}

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
    "regmean": Pipeline(fitted=True),
}


def _settings_of(name: str, pipeline: Pipeline) -> dict[str, _Setting]:
    if pipeline.parity:
        return {**_EVERY, **_PARITY}
    if pipeline.fitted:
        return {**_EVERY, **_FITTED}
    steps = [(step, getattr(pipeline, step)) for step in ("calibrate", "space", "sparsify", "combine")]
    known = {**_EVERY, **_OURS, **(_SEQUENTIAL if pipeline == Pipeline() else {})}
    for step in steps:
        known |= _STEPS.get(step, {})
    return known | ({"normalize": (False, _truth)} if name == "linear" else {})


SETTINGS: dict[str, dict[str, _Setting]] = {name: _settings_of(name, pipeline) for name, pipeline in PIPELINES.items()}

METHOD_NAMES = ", ".join([*(name for name in SETTINGS if not name.startswith("pico_")), "pico_…"])
"""For a message: each name but those that Pico's calibration makes of the others."""


def parse_settings(method: str, settings: Mapping[str, object]) -> dict[str, object]:
    """Settings of a method, complete and typed. Values may be text, as a command line has them.

    Raises NotSupported for an unknown method, setting or value, naming the known ones.
    """
    if method not in SETTINGS:
        raise NotSupported(
            "unknown_method",
            f"There is no method {printable(method)}.",
            subject=method,
            next_step=f"Use one of {METHOD_NAMES}.",
        )
    known = SETTINGS[method]
    parsed = {name: default for name, (default, _) in known.items()}
    for name, value in settings.items():
        if name not in known:
            message = f"{method} has no setting {printable(name)}."
            raise NotSupported(
                "unknown_setting", message, subject=name, next_step=f"It knows {', '.join(sorted(known))}."
            )
        try:
            parsed[name] = known[name][1](value)
        except ValueError as error:
            message = f"The setting {name} is {printable(value)}."
            raise NotSupported("bad_setting", message, subject=name, next_step=f"It is {error}.") from error
    _check_together(method, parsed)
    return {name: value for name, value in parsed.items() if name not in _LEFT_OUT or value != known[name][0]}


def _check_together(method: str, parsed: Mapping[str, object]) -> None:
    density, epsilon = parsed.get("density"), parsed.get("epsilon")
    if isinstance(density, float) and isinstance(epsilon, float) and not epsilon < density < 1 - epsilon:
        message = f"{method} keeps an entry with a probability of density ± epsilon, which leaves 0 to 1 here."
        raise NotSupported("bad_setting", message, subject="epsilon", next_step="Lower epsilon.")


def effective_weights(weights: Sequence[Weight | float], method: str, settings: Mapping[str, object]) -> list[Weight]:
    """What each adapter is multiplied by in the end, the method's own factors included, where it is a plain sum."""
    parsed = parse_settings(method, settings)
    given = [weight.times(cast(float, parsed["lambda"])) for weight in weights_of(weights)]
    if not divides(method, parsed):
        return given
    among = tuple(weights_of(weights))
    return [NormalizedWeight(weight.value, weight.rules, among) for weight in given]


def divides(method: str, parsed: Mapping[str, object]) -> bool:
    """Whether the sum is divided by the sum of the weights."""
    return bool(parsed.get("normalize")) or PIPELINES[method].combine == "mean"
