"""Converts a recipe to the fields of a form, and back. Parts without a field, such as rules for layers, stay text in
YAML."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Self, cast

import yaml

from composer.formats.recipes.lock import ChoiceDocument, LockDocument
from composer.formats.recipes.methods import PIPELINES, settings_of
from composer.formats.recipes.recipe import Recipe, load_recipe, parse_recipe
from registry.api.pages.jobs.chosen import Fields, values_of
from registry.domain.channels.policy.gates import parse_rules

SETTING = "setting."
"""The prefix of the fields for a method's settings."""
_TEXTS = ("adapter", "model", "dtype", "notes")
_SEARCH = ("search", "confirm", "minutes")
_OF_INPUTS = {"adapter", "weight", "suite"}
_OF_RECIPES = {"base", "inputs", "method", "settings", *_TEXTS, "probe", "evaluate", "gates", "optimize"}
"""The keys that have fields. The base is not one of them, since the inputs determine it."""


@dataclass(frozen=True, slots=True)
class InputRow:
    """An input, as written."""

    adapter: str = ""
    weight: str = "1"
    suite: str = ""


@dataclass(frozen=True, slots=True)
class SettingField:
    """A setting of the method. `value` is empty for its default; `choices` is empty unless the allowed values are
    listed."""

    name: str
    description: str
    default: str
    choices: Sequence[str]
    value: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeForm:
    """`texts` are outputs, precision and notes; `numbers` are those of the probe and the search. All values are texts.
    If `recipe` is not empty, it is the recipe in YAML, and the other fields are ignored."""

    rows: tuple[InputRow, ...] = ()
    method: str = ""
    settings: Mapping[str, str]
    texts: Mapping[str, str]
    probe: str = ""
    evaluate: tuple[str, ...] = ()
    gates: str = ""
    ungated: bool = False
    optimize: bool = False
    numbers: Mapping[str, str]
    recipe: str = ""

    @classmethod
    def of_fields(cls, fields: Fields) -> Self:
        """Reads a posted form. Omits rows without an adapter, and the row with the number `drop`."""
        given = {name: value.strip() for name, value in fields}
        columns = [values_of(fields, name) for name in ("input", "weight", "suite")]
        rows = [InputRow(*(part.strip() for part in row)) for row in zip(*columns, strict=False)]
        suites = [*values_of(fields, "evaluate"), *given.get("more_suites", "").replace(",", " ").split()]
        settings = {name: value.strip() for name, value in fields if name.startswith(SETTING) and value.strip()}
        return cls(
            rows=tuple(row for number, row in enumerate(rows) if row.adapter and str(number) != given.get("drop")),
            method=given.get("method", ""),
            settings={name.removeprefix(SETTING): value for name, value in settings.items()},
            texts={name: given[name] for name in _TEXTS if given.get(name)},
            probe=given.get("probe", ""),
            evaluate=tuple(dict.fromkeys(suites)),
            gates=given.get("gates", ""),
            ungated=given.get("ungated") == "yes",
            optimize=given.get("optimize") == "yes",
            numbers={name: given[name] for name in _SEARCH if given.get(name)},
            recipe=given.get("recipe", ""),
        )

    @classmethod
    def of_document(cls, document: Mapping[str, Any]) -> Self:
        """Reads a recipe's JSON: as text if any part has no field."""
        optimize: Mapping[str, Any] = document.get("optimize") or {}
        others = {name for name, value in document.items() if value} - _OF_RECIPES
        others |= {name for row in document["inputs"] for name, value in row.items() if value} - _OF_INPUTS
        others |= {name for name, value in optimize.items() if value} - set(_SEARCH)
        gates: Sequence[str] | None = document.get("gates")
        settings: Mapping[str, Any] = document.get("settings") or {}
        return cls(
            rows=tuple(
                InputRow(str(row["adapter"]), _text(row.get("weight", 1)), _text(row.get("suite")))
                for row in document["inputs"]
            ),
            method=str(document.get("method", "")),
            settings={name: _text(value) for name, value in settings.items()},
            texts={name: str(document[name]) for name in _TEXTS if document.get(name)},
            probe=_text(document.get("probe")),
            evaluate=tuple(document.get("evaluate") or ()),
            gates="\n".join(gates or ()),
            ungated=gates is not None and not gates,
            optimize=bool(document.get("optimize")),
            numbers={name: _text(optimize[name]) for name in _SEARCH if optimize.get(name)},
            recipe=as_yaml(document) if others else "",
        )

    def parse(self) -> Recipe:
        """Raises InvalidFile naming the field."""
        return load_recipe(self.recipe) if self.recipe else parse_recipe(self.document())

    def document(self) -> dict[str, Any]:
        """Returns the recipe. Text in place of a number stays text, which the recipe's parser refuses."""
        inputs = [
            {"adapter": row.adapter, "weight": number(row.weight), **({"suite": row.suite} if row.suite else {})}
            for row in self.rows
        ]
        document: dict[str, Any] = {"inputs": inputs, **self.texts}
        if self.method:
            document |= {
                "method": self.method,
                "settings": {name: number(text) for name, text in self.settings.items()},
            }
        if self.probe:
            document["probe"] = number(self.probe)
        if self.evaluate:
            document["evaluate"] = list(self.evaluate)
        rules = [line.strip() for line in self.gates.splitlines() if line.strip()]
        if rules or self.ungated:
            document["gates"] = rules
        if self.optimize:
            document["optimize"] = {name: number(value) for name, value in self.numbers.items()}
        return document

    @property
    def setting_fields(self) -> list[SettingField]:
        """The settings of the method, its own before those that it shares with the plain mean."""
        if self.method not in PIPELINES:
            return []
        properties = _properties(self.method)
        common = settings_of("mean").field_names()
        names = sorted(properties, key=lambda name: name in common)
        return [_field(name, properties[name], self.settings.get(name, "")) for name in names]


def as_yaml(document: Mapping[str, Any]) -> str:
    """A recipe for people, without empty parts."""
    gates: Mapping[str, object] = {"gates": []} if document.get("gates") == [] else {}  # which is not the same as none
    inputs = [_stated(row) for row in document["inputs"]]
    stated = {**_stated(document), "inputs": inputs, **gates}
    return yaml.safe_dump(stated, sort_keys=False, allow_unicode=True)


def choice_of(lock: LockDocument) -> ChoiceDocument | None:
    """What a search has chosen to combine; None without a search, and if nothing fits."""
    searched = lock.get("optimized")
    return searched["choice"] if searched else None


def recipe_used(recipe: Mapping[str, Any], lock: LockDocument, choice: ChoiceDocument) -> dict[str, Any]:
    """The recipe with its search's choice in place of the search: releases, method, settings, weights, phrases, and
    the gates that an acceptance loosened."""
    if lock.get("set"):
        return {**recipe, "method": None, "settings": {}, "optimize": None, "adapter": None, "model": None}
    phrases: Sequence[str | None] = choice.get("phrases", [None] * len(lock["inputs"]))
    inputs = [
        {
            **stated,
            "weight": locked["weight"],
            **({"rules": locked["rules"]} if "rules" in locked else {}),
            "adapter": f"{locked['repository']}:{locked['version']}",
            "phrase": phrase,
        }
        for stated, locked, phrase in zip(recipe["inputs"], lock["inputs"], phrases, strict=True)
    ]
    used: dict[str, Any] = {"inputs": inputs, "method": lock["method"], "settings": choice["settings"]}
    calibration = lock.get("calibration", [])
    if of_guards := [len(fitted["examples"]) for fitted in calibration[len(inputs) :] if "examples" in fitted]:
        used["guard_examples"] = max(of_guards)
    searched, gates = lock.get("optimized"), lock.get("gates", [])
    if searched and "accepted" in searched and recipe.get("gates") != []:
        judged = [rule.suite for rule in parse_rules(gates)]
        used["gates"] = [*(recipe.get("gates") or ()), *gates]
        used["evaluate"] = list(dict.fromkeys([*(recipe.get("evaluate") or ()), *judged]))
    return {**recipe, **used, "optimize": None, "set": None}


def _stated(document: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in document.items() if value not in (None, "", [], {})}


def number(text: str) -> float | int | str:
    """A number as it appears in a document, or the text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


@cache
def _properties(method: str) -> dict[str, Mapping[str, Any]]:
    return cast("dict[str, Mapping[str, Any]]", settings_of(method).model_json_schema()["properties"])


def _field(name: str, schema: Mapping[str, Any], value: str) -> SettingField:
    choices = (
        ["true", "false"] if schema.get("type") == "boolean" else [_text(choice) for choice in schema.get("enum", ())]
    )
    return SettingField(name, schema.get("description", ""), _text(schema.get("default")), choices, value)


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ",".join(map(str, cast("Sequence[object]", value)))
    return f"{value:.15g}" if isinstance(value, float) else str(value)
