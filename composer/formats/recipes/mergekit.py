"""Recipes from mergekit's YAML, for models that are one base with adapters: `model: BASE+ADAPTER`.

What changes the result and has no counterpart here is refused by name; what does not is left out, and named. Checked
against mergekit 0.1: `linear` is Σ w M / Σ w over models M, the others add to the base.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from math import isclose
from typing import Any, cast

from composer.errors import InvalidFile, NotSupported
from composer.formats.recipes.documents import load_yaml
from composer.formats.recipes.methods import parse_settings
from composer.formats.recipes.recipe import DTYPES
from composer.formats.recipes.weights import LARGEST
from composer.formats.untrusted import printable

_REFUSED_KEYS = {
    "slices": "layers of several models are put on top of each other",
    "modules": "parts of a model are merged by configurations of their own",
}
_LEFT_OUT = ("tokenizer_source", "tokenizer", "chat_template")
_KNOWN_KEYS = {"models", "merge_method", "base_model", "dtype", "out_dtype", "parameters", "name", *_LEFT_OUT}
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True, slots=True)
class _Method:
    """The counterpart of a method: its name here, mergekit's defaults, and the parameters that become settings.
    `elects`: signs are elected; otherwise the weighted deltas add up. `random`: it draws entries."""

    name: str
    normalize: bool = False
    rescale: bool = False
    elects: bool = False
    random: bool = False
    settings: Mapping[str, tuple[str, float]] = field(default_factory=dict[str, tuple[str, float]])


_DENSITY = {"density": ("density", 1.0)}
_METHODS = {
    "linear": _Method("linear", normalize=True),
    "task_arithmetic": _Method("linear"),
    "ties": _Method("ties", normalize=True, elects=True, settings=_DENSITY),
    "dare_ties": _Method("dare_ties", rescale=True, elects=True, random=True, settings=_DENSITY),
    "dare_linear": _Method("dare_linear", rescale=True, random=True, settings=_DENSITY),
    "breadcrumbs": _Method("breadcrumbs", settings={**_DENSITY, "gamma": ("gamma", 0.01)}),
    "breadcrumbs_ties": _Method("breadcrumbs_ties", elects=True, settings={**_DENSITY, "gamma": ("gamma", 0.01)}),
    "della": _Method(
        "della", normalize=True, rescale=True, elects=True, random=True,
        settings={**_DENSITY, "epsilon": ("epsilon", 0.15)},
    ),
    "della_linear": _Method(
        "della_linear", rescale=True, random=True, settings={**_DENSITY, "epsilon": ("epsilon", 0.15)}
    ),
}  # fmt: skip
_PARAMETERS = {"weight", "density", "gamma", "epsilon", "normalize", "rescale", "lambda", "int8_mask"}


@dataclass(frozen=True, slots=True)
class ImportedRecipe:
    """A recipe without outputs, and what was left out or differs, in sentences."""

    recipe: dict[str, Any]
    remarks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Model:
    """A model of the configuration: the base, with an adapter or alone (empty), and its own parameters."""

    name: str
    base: str
    adapter: str
    parameters: Mapping[str, object]


def recipe_of_mergekit(text: str, subject: str) -> ImportedRecipe:
    """Parses a configuration. Raises InvalidFile for what is not one, and NotSupported naming what has no counterpart
    and changes the result."""
    document = load_yaml(text, subject, lambda place, problem: _bad(place, f"it is not YAML: {problem}"))
    config = _mapping(document, subject)
    for key, why in _REFUSED_KEYS.items():
        if key in config:
            raise _no_counterpart(key, why)
    if unknown := sorted(set(config) - _KNOWN_KEYS):
        raise _no_counterpart(unknown[0], "it is not known here")
    method = _METHODS.get(str(config.get("merge_method")))
    if method is None:
        known = ", ".join(_METHODS)
        raise _no_counterpart(f"merge_method {printable(config.get('merge_method'))}", f"only these have one: {known}")
    shared = _mapping(config.get("parameters") or {}, "parameters")
    models = list(_models(config, shared))
    base = _base(models, config)
    return ImportedRecipe(
        {"base": base, "inputs": _inputs(models, method, shared), "method": method.name}
        | _settings(models, method, shared)
        | _dtype(config),
        tuple(_remarks(config, method)),
    )


def _models(config: Mapping[str, object], shared: Mapping[str, object]) -> Iterator[_Model]:
    listed = config.get("models")
    if not isinstance(listed, list) or not listed:
        raise _bad("models", "it is not a list of models")
    for index, row in enumerate(cast("list[object]", listed)):
        stated = _mapping(row, f"models[{index}]")
        name = _reference(stated.get("model"), f"models[{index}].model")
        own = _mapping(stated.get("parameters") or {}, f"models[{index}].parameters")
        if other := sorted(set(stated) - {"model", "parameters"}):
            raise _no_counterpart(f"models[{index}].{other[0]}", "it is not known here")
        if unknown := sorted((set(own) | set(shared)) - _PARAMETERS):
            raise _no_counterpart(f"the parameter {unknown[0]}", "it is not known here")
        model, _, adapter = name.partition("+")
        yield _Model(name, model.strip(), adapter.strip(), own)


def _reference(value: object, place: str) -> str:
    """BASE+ADAPTER, also from the mapping of both that mergekit writes."""
    if isinstance(value, dict):
        parts = _mapping(cast("object", value), place)
        if unknown := sorted(set(parts) - {"model", "lora", "override_architecture"}):
            raise _no_counterpart(f"{place}.{unknown[0]}", "it is not known here")
        paths = [_path(parts.get("model"), f"{place}.model")]
        return "+".join(paths + ([_path(parts["lora"], f"{place}.lora")] if parts.get("lora") else []))
    if not isinstance(value, str) or not value.strip("+ "):
        raise _bad(place, "it is not a text such as BASE+ADAPTER")
    return value


def _path(value: object, place: str) -> str:
    """PATH, or PATH@REVISION, of a text or a mapping."""
    stated = {"path": value} if isinstance(value, str) else _mapping(value, place)
    parts = [stated.get("path"), *filter(None, [stated.get("revision")])]
    if not all(isinstance(part, str) and part for part in parts):
        raise _bad(place, "it has no path")
    return "@".join(map(str, parts))


def _base(models: list[_Model], config: Mapping[str, object]) -> str:
    """The base of all models. Raises NotSupported for full fine-tunes, and for adapters of several bases."""
    stated = config.get("base_model")
    base = models[0].base if stated is None else _reference(stated, "base_model")
    if "+" in base:
        raise _no_counterpart("base_model", f"{base} is a base with an adapter, and the deltas are taken from it")
    for model in models:
        if model.base != base:
            why = f"{model.name} is not {base} with an adapter; `adaptory extract` makes an adapter of a full fine-tune"
            raise _no_counterpart("models", why)
    if not any(model.adapter for model in models):
        raise _no_counterpart("models", "none has an adapter (BASE+ADAPTER)")
    return base


def _inputs(models: list[_Model], method: _Method, shared: Mapping[str, object]) -> list[dict[str, Any]]:
    """The adapters with their weights. Where the sum is divided by the sum of the weights and signs are not elected,
    it is divided here, since a base among the models counts too."""
    weighted = [(model, *_weight(model, shared)) for model in models]
    alone = [weight for model, weight, _ in weighted if not model.adapter]
    total = sum(weight for _, weight, _ in weighted)
    divides, ruled = _flag("normalize", method.normalize, shared), any(rules for _, _, rules in weighted)
    is_average = method is _METHODS["linear"]
    counted = total if is_average else total - sum(alone)
    if is_average and not divides and (ruled or not isclose(total, 1)):
        raise _no_counterpart("normalize", "weights that do not add up to 1 would scale the base itself")
    if method.elects or not divides:
        divisor = 1.0
    elif ruled:
        raise _no_counterpart("weight", "weights by filter are divided by another sum in each module")
    elif isclose(counted, 0, abs_tol=1e-9):
        raise _bad("weight", "the weights add up to 0")
    else:
        divisor = counted
    return [
        {"adapter": model.adapter, "weight": float(f"{weight / divisor:.12g}"), **({"rules": rules} if rules else {})}
        for model, weight, rules in weighted
        if model.adapter
    ]


def _weight(model: _Model, shared: Mapping[str, object]) -> tuple[float, list[dict[str, Any]]]:
    """The weight of a model, and other weights in modules, of a list with filters: the first match counts."""
    value = model.parameters.get("weight", shared.get("weight"))
    listed = cast("list[object]", value) if isinstance(value, list) else []
    if listed and all(isinstance(row, dict) for row in listed):
        rules: list[dict[str, Any]] = []
        for row in cast("list[dict[str, object]]", listed):
            own, wanted = _number(row.get("value"), f"weight of {model.name}"), row.get("filter")
            if wanted is None or wanted == "*":
                return own, rules
            rules.append({"modules": f"*{_part_of_name(wanted, model.name)}*", "weight": own})
        raise _no_counterpart(f"weight of {model.name}", "no row without a filter says what holds elsewhere")
    if value is None and not model.adapter:
        return 0.0, []
    return _number(cast("object", value), f"weight of {model.name}"), []


def _part_of_name(wanted: object, model: str) -> str:
    """A filter is a part of a tensor's name; rules are for modules."""
    if not isinstance(wanted, str) or set(wanted) & set("*?[]"):
        raise _no_counterpart(f"the filter {printable(wanted)} of {model}", "it is not plain text of a tensor name")
    return wanted.removesuffix(".weight")


def _settings(models: list[_Model], method: _Method, shared: Mapping[str, object]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for name, (own, default) in method.settings.items():
        values = {
            _number(model.parameters.get(name, shared.get(name, default)), name) for model in models if model.adapter
        }
        if len(values) > 1:
            listed = ", ".join(f"{value:g}" for value in sorted(values))
            raise _no_counterpart(name, f"it is one for all adapters here, not {listed}")
        settings[own] = values.pop()
    if method.elects:
        divided = "weights" if _flag("normalize", method.normalize, shared) else "none"
        settings |= {"vote": "weighted", "divide": divided}
    if _flag("rescale", method.rescale, shared) != method.rescale:
        raise _no_counterpart("rescale", f"{method.name} {'always' if method.rescale else 'never'} rescales here")
    if (factor := _number(shared.get("lambda", 1.0), "lambda")) != 1:
        settings["lambda"] = factor
    try:
        parse_settings(method.name, settings)
    except NotSupported as error:
        stated, expected = settings.get(str(error.subject)), str(error.next_step).removeprefix("It is ").rstrip(".")
        raise _bad(str(error.subject), f"{stated:g} is not {expected}") from error
    return {"settings": settings} if settings else {}


def _flag(name: str, default: bool, shared: Mapping[str, object]) -> bool:
    value = shared.get(name, default)
    if value not in (True, False):  # also 1 and 0
        raise _bad(name, f"{printable(value)} is neither true nor false")
    return bool(value)


def _dtype(config: Mapping[str, object]) -> dict[str, str]:
    stated = config.get("out_dtype") or config.get("dtype")
    if stated is None:
        return {}
    dtype = _DTYPES.get(str(stated), str(stated))
    if dtype not in DTYPES:
        raise _no_counterpart(f"dtype {printable(stated)}", f"the dtypes are {', '.join(DTYPES)}")
    return {"dtype": dtype}


def _remarks(config: Mapping[str, object], method: _Method) -> Iterator[str]:
    for name in _LEFT_OUT:
        if config.get(name) not in (None, "base", "auto"):
            yield f"{name} is left out: the tokenizer is the base's, or that of an adapter which brings its own."
    if method.random:
        yield "Random masks are drawn otherwise, so single values differ."
    if method.rescale:
        yield "What is kept is divided by its probability; mergekit scales it to the L1 norm that the delta had."
    yield "Add `model:` or `adapter:` for `adaptory compose`; `adaptory merge` needs neither."


def _mapping(value: object, place: str) -> dict[str, object]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in cast("dict[object, object]", value)):
        raise _bad(place, "it is not a mapping")
    return cast("dict[str, object]", value)


def _number(value: object, place: str) -> float:
    if isinstance(value, list):
        raise _no_counterpart(place, "it varies from layer to layer; write rules for layers instead")
    if isinstance(value, str):
        with suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _bad(place, f"{printable(value)} is not a number")
    if not -LARGEST <= value <= LARGEST:
        raise _bad(place, f"it is not a number of at most {LARGEST:g} in magnitude")
    return float(value)


def _bad(place: str, why: str) -> InvalidFile:
    step = "Correct the configuration; mergekit's documentation describes it."
    return InvalidFile("bad_mergekit", f"{place}: {why}.", subject=place, next_step=step)


def _no_counterpart(what: str, why: str) -> NotSupported:
    return NotSupported("no_counterpart", f"{what} has no counterpart in a recipe: {why}.", subject=what)
