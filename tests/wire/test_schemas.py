"""The schemas for editors: a change of a document's permitted content is a line in a diff. They have every field and
its values, but neither the syntax of texts that stand for numbers, nor the settings that belong to each method."""

import json
from typing import Any

import pytest
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from composer.formats.recipes.documents import Document
from composer.formats.recipes.methods import PIPELINES, settings_of
from composer.formats.recipes.policy import PolicyDocument
from composer.formats.recipes.recipe import Recipe
from composer.formats.recipes.suite import Suite
from registry.formats.channel_policy import ChannelPolicy
from tests.wire import snapshots

KINDS = ("recipe", "suite", "channel-policy", "policy")


class _Plain(GenerateJsonSchema):
    """Without titles, which repeat the name of a field, and without null as a default, which few fields accept."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        made = super().default_schema(schema)
        return {name: value for name, value in made.items() if name != "default" or value is not None}

    def generate(self, schema: CoreSchema, mode: Any = "validation") -> JsonSchemaValue:
        return {"$schema": self.schema_dialect, **super().generate(schema, mode)}


def schema_of(kind: str) -> dict[str, Any]:
    """The schema of a `recipe`, a `suite`, a `policy` or a `channel-policy`."""
    model: type[Document] = {
        "recipe": Recipe,
        "suite": Suite,
        "policy": PolicyDocument,
        "channel-policy": ChannelPolicy,
    }[kind]
    schema = model.model_json_schema(schema_generator=_Plain)
    fields = schema["properties"]
    if kind == "recipe":
        fields["settings"] = {"type": ["object", "null"], "properties": _settings(), "additionalProperties": False}
    if kind == "suite":
        fields["examples"] = {
            "anyOf": [{"type": "string", "description": "A JSONL file beside it."}, fields["examples"]]
        }
    return schema | {"title": f"Adaptory {kind.replace('-', ' ')}"}


def _settings() -> dict[str, Any]:
    """The settings of all methods together."""
    known: dict[str, Any] = {}
    for method in PIPELINES:
        for name, schema in settings_of(method).model_json_schema(schema_generator=_Plain)["properties"].items():
            known.setdefault(name, {key: value for key, value in schema.items() if key != "default"})
    return known


@pytest.mark.parametrize("kind", KINDS)
def test_the_published_schema_is_that_of_the_model(kind: str) -> None:
    snapshots.check(f"../../docs/schemas/{kind}.schema.json", json.dumps(schema_of(kind), indent=2, ensure_ascii=False))
