"""docs/reference/schemas.md, from the JSON Schemas."""

from collections.abc import Iterator
from typing import Any

from tests.wire.reference.markdown import code, joined, plain, table

HEAD = """# Documents

The fields of the YAML documents that people write: recipes, suites and policies. Their JSON Schemas are for editors.
With a YAML language server, begin a file with `# yaml-language-server: $schema=` and the path or address of its
schema; then the editor completes and checks it.

The parser accepts a little more than a schema can say: a number may also be written as text. Each method has settings
of its own ([Methods](../methods/index.md)). An unknown field is an error. This page is made from the schemas: `make
snapshots` writes it.

"""
ABOUT = {
    "recipe": "[`adaptory compose`](cli.md#adaptory-compose) accepts it ([Compositions](../concepts/compositions.md)).",
    "suite": "[`adaptory suite add`](cli.md#adaptory-suite-add) accepts it ([Evaluate](../how-to/evaluate.md)).",
    "channel-policy": (
        "[`adaptory policy set`](cli.md#adaptory-policy-set) accepts it ([Gates and policies](../how-to/policies.md))."
    ),
    "policy": (
        "The severity of each finding of a conflict check. [`adaptory conflicts --policy`](cli.md#adaptory-conflicts) "
        "accepts it, and so does `policy` of a recipe "
        "([Findings and policies](../concepts/conflicts.md#findings-and-policies))."
    ),
}


def page(schemas: dict[str, dict[str, Any]]) -> str:
    return joined(HEAD, *(part for kind, schema in schemas.items() for part in _document(kind, schema)))


def _document(kind: str, schema: dict[str, Any]) -> Iterator[str]:
    yield f"## {schema['title'].removeprefix('Adaptory ').capitalize()}\n\n{ABOUT[kind]}\n\n"
    yield f"JSON Schema: [`{kind}.schema.json`](../schemas/{kind}.schema.json).\n\n"
    if kind != "policy":
        yield _fields(schema)
    else:
        severities = {
            name: part for name, part in schema["properties"].items() if name not in ("require", "thresholds")
        }
        free = [code(name) for name, severity in severities.items() if "enum" in severity]
        fixed = [code(name) for name, severity in severities.items() if "const" in severity]
        yield _fields({**schema, "properties": {n: schema["properties"][n] for n in ("require", "thresholds")}})
        yield f"`notice`, `warning`, `error` or `ignore` for each of {', '.join(free)}.\n\n"
        yield f"Always `error`: {', '.join(fixed)}.\n\n"
    for name, below in schema.get("$defs", {}).items():
        if below.get("type") == "object" and name != "Policy":
            yield f"### {kind}: {name.strip('_')}\n\n"
            about = " ".join(below.get("description", "").split())
            yield f"{plain(about)}\n\n" if about else ""
            yield _fields(below)


def _fields(schema: dict[str, Any]) -> str:
    required = schema.get("required", ())
    rows = [
        (
            code(name),
            _type(part),
            "required" if name in required else _default(part),
            plain(part.get("description", "")),
        )
        for name, part in schema.get("properties", {}).items()
    ]
    return table(("field", "type", "default", "meaning"), rows) + "\n"


def _type(one: dict[str, Any]) -> str:
    if "$ref" in one:
        return one["$ref"].rpartition("/")[2].strip("_")
    if "anyOf" in one:
        return " or ".join(dict.fromkeys(_type(part) for part in one["anyOf"] if part.get("type") != "null"))
    if "enum" in one:
        choices = [code(str(value)) for value in one["enum"] if value not in (None, "")]
        return ", ".join(choices) if len(choices) <= 8 else f"one of {len(choices)}"
    if "const" in one:
        return code(str(one["const"]))
    if one.get("type") == "array":
        return f"list of {_type(one.get('items', {})) or 'values'}"
    kinds = one.get("type", "")
    kind = " or ".join(part for part in kinds if part != "null") if isinstance(kinds, list) else kinds
    bounds = [f"{sign} {one[key]:g}" for key, sign in LIMITS.items() if key in one and abs(one[key]) < 1e9]
    return f"{kind} {', '.join(bounds)}".strip()


LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def _default(one: dict[str, Any]) -> str:
    if "default" not in one or one["default"] in ("", [], None) or isinstance(one["default"], dict):
        return "none"
    value = one["default"]
    return code(str(value).lower() if isinstance(value, bool) else str(value))
