"""Documents that users write, as pydantic models: unknown fields are refused and nothing is converted by pydantic.

`problem_of` turns pydantic's errors into the one sentence of ours that a parser raises.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError, model_validator
from pydantic_core import CoreSchema, ErrorDetails, core_schema

from composer.formats.untrusted import printable

_WORD = re.compile(r"'([^']*)'")
_MUST_BE = {
    "string_type": "text",
    "string_unicode": "text without half a surrogate pair",
    "bool_type": "true or false",
    "int_type": "a whole number",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "dataclass_type": "a mapping",
    "less_than_equal": "at most {le}",
    "greater_than_equal": "at least {ge}",
    "string_too_short": "text of at least {min_length} character",
    "string_too_long": "text of at most {max_length} characters",
}


class UnknownField(ValueError):
    """A mapping has a key that is not one of `keys`."""

    def __init__(self, field: object, keys: list[str]) -> None:
        super().__init__("unknown field")  # the field itself may be text that pydantic cannot print
        self.field, self.keys = field, keys


class Refusal(ValueError):
    """For a validator to raise where values do not go together: `why` ends the sentence that begins with the field."""

    def __init__(self, why: str, next_step: str = "", *, field: str = "") -> None:
        super().__init__(why)
        self.next_step, self.field = next_step, field


class Document(BaseModel):
    """A mapping with these fields and no others. Models are built on first use, since a command needs few of them."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, defer_build=True)

    @classmethod
    def field_names(cls) -> list[str]:
        """The names of the fields, as a document has them."""
        return [field.alias or name for name, field in cls.model_fields.items()]

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, document: object) -> object:
        """Refuses an unknown field before a missing one, which it may be the misspelling of."""
        if isinstance(document, dict):
            keys = cls.field_names()
            for key in cast("dict[object, object]", document):
                if key not in keys:
                    raise UnknownField(key, keys)
        return cast(object, document)


@dataclass(frozen=True, slots=True, eq=False)
class Reader:
    """Annotates a field whose value `read` makes, also from the text that a command line has; it raises ValueError,
    saying what the value must be. `schema` is what an editor suggests."""

    read: Callable[[object], object]
    schema: dict[str, Any]

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.read)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return self.schema


@dataclass(frozen=True, slots=True)
class Problem:
    """The first thing that is wrong in a document, as `path: why`. `path` is that of the field (`inputs[0].weight`),
    empty for the document itself. `value` is what is there, and `expected` what must be, where that is all."""

    path: str
    why: str
    next_step: str = ""
    value: object = None
    expected: str = ""
    unknown: bool = False

    def at(self, subject: str) -> str:
        return f"{subject}: {self.path}" if self.path else subject


def problem_of(error: ValidationError) -> Problem:
    """The first of pydantic's errors, in our words."""
    first = error.errors(include_url=False)[0]
    context, path = first.get("ctx", {}), _path(first["loc"])
    match context.get("error"):
        case UnknownField(field=field, keys=keys):
            return _unknown(path, field, keys)
        case Refusal() as refusal:
            return Problem(_path((*first["loc"], refusal.field)), str(refusal), refusal.next_step)
        case _:
            pass
    match first["type"]:
        case "unexpected_keyword_argument":
            return Problem(path, "it is not a field here")
        case "missing":
            return Problem(path, "it is missing")
        case "too_short":
            return Problem(path, f"it has fewer than {context['min_length']}")
        case "too_long":
            return Problem(path, f"it has more than {context['max_length']}")
        case _:
            value, expected = first["input"], _expected(first)
            return Problem(path, f"{printable(value)} is not {expected}", value=value, expected=expected)


def _unknown(path: str, field: object, keys: list[str]) -> Problem:
    name = field if isinstance(field, str) and field.isidentifier() and len(field) < 100 else printable(field)
    near = get_close_matches(field, keys, 1) if isinstance(field, str) else []
    hint = f"Did you mean {near[0]}? " if near else ""
    next_step = f"{hint}It knows {', '.join(sorted(keys))}."
    return Problem(path, f"there is no field {name}", next_step, value=field, unknown=True)


def _expected(error: ErrorDetails) -> str:
    context = error.get("ctx", {})
    match error["type"]:
        case "literal_error":
            return f"one of {', '.join(_WORD.findall(context['expected']))}"
        case "value_error":
            return str(context["error"])
        case kind:
            return _MUST_BE[kind].format(**context)


def _path(loc: tuple[int | str, ...]) -> str:
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part:
            path += f".{part if part.isidentifier() else printable(part)}"
    return path.removeprefix(".")
