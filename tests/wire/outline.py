"""An OpenAPI document as an outline: a line for each route, parameter, answer and field, so that a diff shows what
changes for a client. Descriptions and titles are left out: the reference pages have them."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

Json = Mapping[str, Any]

_SAID = frozenset(
    {"title", "description", "type", "properties", "required", "items", "anyOf", "oneOf", "$ref", "format"}
)
"""Keys that the outline shows in its own way, or not at all."""
_NAME = re.compile(r".*/")


def outline(document: Json) -> str:
    """The routes by path, then the schemas by name."""
    routes = [line for path, item in sorted(document["paths"].items()) for line in _routes(path, item)]
    schemas = [
        line for name, schema in sorted(document["components"]["schemas"].items()) for line in _schema(name, schema)
    ]
    others = {name: part for name, part in document["components"].items() if name != "schemas"}
    rest = {name: part for name, part in document.items() if name not in ("paths", "components")}
    return "\n".join([*routes, "", *schemas, "", f"components {others}", f"document {rest}"])


def _routes(path: str, item: Json) -> Iterator[str]:
    for method, route in sorted(item.items()):
        security = " or ".join(", ".join(scheme) or "anyone" for scheme in route.get("security", [])) or "anyone"
        yield f"{method.upper()} {path} ({security}): {_answers(route['responses'])}"
        for parameter in sorted(route.get("parameters", []), key=lambda one: (one["in"], one["name"])):
            optional = "" if parameter.get("required") else "?"
            yield f"  {parameter['in']} {parameter['name']}{optional}: {kind(parameter['schema'])}"
        body = route.get("requestBody")
        for media, content in sorted((body or {}).get("content", {}).items()):
            required = "" if body.get("required") else "?"
            yield f"  body{required} {media}: {kind(content.get('schema', {}))}"


def _answers(responses: Json) -> str:
    """Each status with its content; those with a problem document together."""
    problems = [
        status for status, response in responses.items() if "application/problem+json" in response.get("content", {})
    ]
    others = [
        f"{status} {_reference(response) or ' or '.join(_content(response)) or 'nothing'}"
        for status, response in responses.items()
        if status not in problems
    ]
    return "; ".join([*others, f"problems {' '.join(problems)}"] if problems else others)


def _content(answer: Json) -> list[str]:
    return [
        kind(content.get("schema", {})) if media == "application/json" else f"{media} {kind(content.get('schema', {}))}"
        for media, content in sorted(answer.get("content", {}).items())
    ]


def _schema(name: str, schema: Json) -> Iterator[str]:
    if "properties" not in schema:
        yield f"{name}: {kind(schema)}"
        return
    yield f"{name}{_limits(schema)}:"
    for field, part in sorted(schema["properties"].items()):
        yield f"  {field}{'' if field in schema.get('required', ()) else '?'}: {kind(part)}"


def kind(schema: Json) -> str:
    """A schema in a few words, such as `[ReleaseOut] minItems=1` or `integer|null`."""
    choices = schema.get("anyOf") or schema.get("oneOf")
    if choices:
        base = "|".join(map(kind, choices))
    elif "$ref" in schema:
        base = _reference(schema)
    elif schema.get("type") == "array":
        base = f"[{kind(schema.get('items', {}))}]"
    elif "properties" in schema:
        base = "{" + ", ".join(f"{name}: {kind(part)}" for name, part in sorted(schema["properties"].items())) + "}"
    else:
        base = " ".join(str(schema[key]) for key in ("type", "format") if key in schema) or "any"
    return base + _limits(schema)


def _limits(schema: Json) -> str:
    limits = {key: value for key, value in sorted(schema.items()) if key not in _SAID}
    return "".join(f" {key}={_limit(value)}" for key, value in limits.items())


def _limit(value: object) -> str:
    return f"({kind(value)})" if isinstance(value, Mapping) else str(value)


def _reference(schema: Json) -> str:
    return _NAME.sub("", schema.get("$ref", ""))
