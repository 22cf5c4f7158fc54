"""docs/reference/rest.md, from the OpenAPI document and the rules that a test tries on every route."""

import re
from collections.abc import Iterator
from typing import Any

from tests.access.stated import STATED
from tests.wire.reference.markdown import code, joined, plain, table

HEAD = """# REST

Every route of the registry. The server describes them itself, with all schemas, at `/openapi.json`. This page is made
from that document: `make snapshots` writes it. `…` stands for the path of a repository,
`/v1/adapters/{namespace}/{name}` or `/v1/models/{namespace}/{name}`.

- **Tokens.** `Authorization: Bearer adp_…`, unless the server has one user.
- **Who may.** A role is one in the namespace of the path, or a higher one: reader, publisher, releaser, admin.
  *Somewhere* means in any namespace. *Decided by the route* means that the route looks at the row first, then asks
  for that role in its namespace. *Everybody* sees what they may read.
- **Problems.** Every error is a document of RFC 9457, `application/problem+json`, with a `code`
  ([Errors](errors.md)). Any route may answer with the statuses below, so they are not repeated with each.
- **Repeating.** A request that changes something and accepts `Idempotency-Key` takes effect once, however often it is
  sent.

"""
COMMON = ("400", "401", "403", "404", "409", "412", "413", "422", "429", "503")
SUBJECTS = {
    "releases": "Releases", "resolve": "Releases", "channels": "Channels", "gates": "Channels", "moves": "Channels",
    "scores": "Scores and suites", "suites": "Scores and suites", "target-suite": "Scores and suites",
    "evaluations": "Scores and suites", "bases": "Bases", "upgrades": "Bases", "uploads": "Bytes", "blobs": "Bytes",
    "compositions": "Compositions and conflicts", "conflicts": "Compositions and conflicts",
}  # fmt: skip
"""The section of a path by its last part that is here; all others are of the last section."""
LAST = "Access and operation"


def page(document: dict[str, Any]) -> str:
    sections: dict[str, list[str]] = {name: [] for name in (*dict.fromkeys(SUBJECTS.values()), LAST)}
    statuses: dict[str, str] = {}
    for path, operations in sorted(document["paths"].items()):
        if path.startswith("/v1/models"):
            continue
        for method, operation in operations.items():
            sections[_section(path)].append("".join(_operation(document, path, method.upper(), operation)))
            statuses |= {
                status: row["description"] for status, row in operation["responses"].items() if status in COMMON
            }
    problems = "## Statuses of problems\n\n" + table(("status", "meaning"), sorted(statuses.items())) + "\n"
    return joined(HEAD, problems, *(f"## {name}\n\n" + "".join(rows) for name, rows in sections.items()))


def _section(path: str) -> str:
    known = [part for part in path.split("/") if part in SUBJECTS]
    return SUBJECTS[known[-1]] if known else LAST


def _operation(document: dict[str, Any], path: str, method: str, operation: dict[str, Any]) -> Iterator[str]:
    shown = path.replace("/v1/adapters/{namespace}/{name}", "…").replace("/v1/adapters", "/v1/{kind}")
    yield f"### {method} {shown}\n\n"
    summary, description = operation.get("summary", ""), operation.get("description", "")
    yield f"{plain(' '.join((description or f'{summary}.').split()))}\n\n"
    yield f"Who may: {_who(method, path)}.\n\n"
    rows = [
        (code(parameter["name"]), parameter["in"], _type(parameter["schema"]), plain(parameter.get("description", "")))
        for parameter in operation.get("parameters", ())
        if parameter["in"] != "path" or parameter.get("description")
        if parameter["name"] != "Idempotency-Key"
    ]
    yield table(("parameter", "in", "type", "meaning"), rows) + ("\n" if rows else "")
    keyed = any(parameter["name"] == "Idempotency-Key" for parameter in operation.get("parameters", ()))
    body = operation.get("requestBody", {}).get("content", {})
    for media, content in body.items():
        name = content["schema"].get("$ref", "").rpartition("/")[2]
        fields = document["components"]["schemas"].get(name, {})
        yield f"Body, {code(media)}" + (f", {code(name)}:\n\n" if fields.get("properties") else ".\n\n")
        required = fields.get("required", ())
        yield table(
            ("field", "type", "meaning"),
            [
                (
                    code(field) + (" (required)" if field in required else ""),
                    _type(field_schema),
                    plain(field_schema.get("description", "")),
                )
                for field, field_schema in fields.get("properties", {}).items()
            ],
        ) + ("\n" if fields.get("properties") else "")
    answers = ", ".join(
        _answer(status, row) for status, row in operation["responses"].items() if status not in (*COMMON, "default")
    )
    yield f"Answers: {answers or 'a problem'}." + (" Accepts `Idempotency-Key`.\n\n" if keyed else "\n\n")


def _who(method: str, path: str) -> str:
    rules = {rule for (verb, known), rule in STATED.items() if verb == method and re.sub(r":path}", "}", known) == path}
    assert len(rules) == 1, f"{method} {path}"
    rule = rules.pop()
    if rule == "open":
        return "anybody"
    decided, _, role = rule.rpartition("inside: ")
    return role if not decided and role == rule else f"{role}, decided by the route"


def _type(schema: dict[str, Any]) -> str:
    """The type of a parameter or a field: its type, its choices or the schema that describes it."""
    if "$ref" in schema:
        return code(schema["$ref"].rpartition("/")[2])
    if "anyOf" in schema:
        kinds = [_type(kind) for kind in schema["anyOf"] if kind.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in schema:
        return ", ".join(code(str(value)) for value in schema["enum"])
    if "const" in schema:
        return code(str(schema["const"]))
    if schema.get("type") == "array":
        return f"array of {_type(schema.get('items', {})) or 'values'}"
    return schema.get("format") or schema.get("type", "")


def _answer(status: str, row: dict[str, Any]) -> str:
    kinds = []
    for media, content in row.get("content", {}).items():
        kind = _type(content.get("schema", {}))
        kinds.append(kind if kind.startswith(("`", "array")) and media == "application/json" else code(media))
    return f"{status} {' or '.join(kinds)}".strip()
