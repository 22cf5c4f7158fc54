"""Recipes, suites, policies and settings are read as ever, and have schemas for editors. `documents.jsonl` has [kind,
YAML, outcome, detail] of documents read before pydantic did it: for `ok` the detail is a digest of the result, for an
error's code its subject."""

import hashlib
import json
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml

from composer.errors import ComposerError
from composer.formats.recipes.methods import parse_settings
from composer.formats.recipes.policy import read_policy
from composer.formats.recipes.recipe import parse_recipe
from composer.formats.recipes.suite import Suite

ROOT = Path(__file__).parents[3]
ROWS = [json.loads(line) for line in Path(__file__).with_name("documents.jsonl").read_text().splitlines()]


def read(kind: str, document: Any) -> object:
    """The content of the document, as JSON."""
    if kind == "recipe":
        return parse_recipe(document).to_json()
    if kind == "suite":
        suite = Suite.from_json(document)
        return [suite.to_json(), suite.digest, suite.higher_is_better]
    if kind == "policy":
        policy = read_policy(document)
        return {
            "overrides": dict(sorted(policy.overrides.items())),
            "thresholds": dict(sorted(policy.thresholds.items())),
            "modes": sorted(policy.modes),
            "require": policy.require,
        }
    return parse_settings(document["method"], document["settings"]).to_json()


def outcome(kind: str, text: str) -> list[str]:
    try:
        content = json.dumps(read(kind, yaml.safe_load(text)))
    except ComposerError as error:
        str(error).encode()  # it can be stored and shown
        return [error.code, error.subject]
    return ["ok", hashlib.sha256(content.encode()).hexdigest()[:12]]


@pytest.mark.parametrize("kind", ["recipe", "suite", "policy", "settings"])
def test_documents_are_read_or_refused_as_they_were_before(kind: str) -> None:
    rows = [row for row in ROWS if row[0] == kind]
    assert len(rows) > 100
    others = [(text, expected, actual) for _, text, *expected in rows if (actual := outcome(kind, text)) != expected]
    assert others == []


@pytest.mark.parametrize(
    ("document", "message", "next_step"),
    [
        ({"gates": ["a.nll <= 1", 3]}, "recipe: gates[1]: 3 is not text.", "Correct the recipe."),
        (
            {"metod": "ties"},
            "recipe: unknown field 'metod'.",
            "Did you mean method? Known fields: inputs, method,",
        ),
        ({"inputs": [{"adapter": "a/b", "weight": "a lot"}]}, "inputs[0].weight: 'a lot' is not a finite number.", ""),
        ({"inputs": ["a/b", {"adapter": 3}]}, "recipe: inputs[1].adapter: 3 is not text.", ""),
        ({"settings": {"lambda": []}}, "settings.lambda: a value of type list is not a finite number.", ""),
        ({"settings": {"lamda": 1}}, "recipe: settings: unknown field 'lamda'.", "Did you mean lambda? Known fields:"),
        ({"policy": {"thresholds": {"crowding": "much"}}}, "policy.thresholds.crowding: 'much' is not a finite", ""),
        ({"rounding": {"mode": "stochastic", "seed": -1}}, "recipe: rounding.seed: -1 is not at least 0.", ""),
        ({"probe": True}, "recipe: probe: True is not a whole number.", ""),
        ({"inputs": []}, "recipe: inputs: it has 0 entries, and at least 1 is needed.", ""),
        ({"dtype": "half"}, "recipe: dtype: 'half' is not one of float32, bfloat16, float16.", ""),
    ],
)
def test_an_error_names_the_path_of_the_field_and_what_is_allowed(
    document: dict[str, object], message: str, next_step: str
) -> None:
    with pytest.raises(ComposerError) as refused:
        parse_recipe({"inputs": ["a/b"], "method": "stack"} | document)
    assert message in refused.value.message
    assert next_step in refused.value.next_step


EXAMPLES = [
    *(("recipe", path) for path in sorted((ROOT / "examples").glob("*.yaml"))),
    *(("suite", path) for path in sorted((ROOT / "examples/suites").glob("*.yaml"))),
    *(("channel-policy", path) for path in sorted((ROOT / "examples/policies").glob("*.yaml"))),
]


@pytest.mark.parametrize(("kind", "path"), EXAMPLES, ids=lambda value: getattr(value, "stem", value))
def test_a_published_schema_accepts_the_examples_and_no_misspelt_field(kind: str, path: Path) -> None:
    validator = jsonschema_rs.validator_for(json.loads((ROOT / f"docs/schemas/{kind}.schema.json").read_text()))
    document = yaml.safe_load(path.read_text())
    validator.validate(document)
    assert not validator.is_valid(document | {"inputz": []})
    for field in document:
        assert not validator.is_valid(document | {field: {"a": 1}})
