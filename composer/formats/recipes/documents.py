"""Documents that users write, as pydantic models.

Unknown fields are refused, and pydantic converts nothing. `problem_of` turns pydantic's errors into one sentence of our
own, which a parser raises.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, cast

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import CoreSchema, ErrorDetails, core_schema

from composer.formats.untrusted import printable

Loc = tuple[int | str, ...]


def _tuple_of(value: object) -> object:
    return tuple(cast("list[object]", value)) if isinstance(value, list) else value


LISTED = BeforeValidator(_tuple_of)
"""The last annotation of a field that is a list in a document and a tuple in the model."""

_WORD = re.compile(r"'([^']*)'")
_MUST_BE = {
    "string_type": "text",
    "string_unicode": "text without an unpaired surrogate",
    "bool_type": "true or false",
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "dataclass_type": "a mapping",
    "less_than_equal": "at most {le}",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "string_too_short": "text of at least {min_length} character",
    "string_too_long": "text of at most {max_length} characters",
}


class UnknownField(ValueError):
    """A mapping has a key that is not one of `names`."""

    def __init__(self, key: object, names: list[str]) -> None:
        super().__init__("unknown field")  # pydantic prints this, and cannot print every text that a key may be
        self.key, self.names = key, names


class RefusedValues(ValueError):
    """Raised by a validator for values that contradict each other; `why` ends a sentence that begins with the field."""

    def __init__(self, why: str, next_step: str = "", *, path: Loc = ()) -> None:
        super().__init__(why)
        self.next_step, self.path = next_step, path


def load_yaml(text: str, subject: str, refusal: Callable[[str, str], Exception]) -> object:
    """Parses YAML into plain values. Raises what `refusal` makes of the place, SUBJECT:LINE where the line is known,
    and the problem."""
    try:
        return cast(object, yaml.safe_load(text))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{subject}:{mark.line + 1}" if mark else subject
        raise refusal(place, str(getattr(error, "problem", None) or error)) from error


class Document(BaseModel):
    """A mapping with these fields and no others. Models are built on first use, since a command needs few of them."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, defer_build=True)

    @classmethod
    def field_names(cls) -> list[str]:
        """The names of the fields in a document."""
        return [field.alias or name for name, field in cls.model_fields.items()]

    def given(self) -> dict[str, Any]:
        """The fields that are set in the document."""
        return {name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set}

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, document: object) -> object:
        """Refuses an unknown field before a missing one, since it may be its misspelling."""
        return refuse_unknown(document, cls.field_names())


def refuse_unknown(document: object, names: list[str]) -> object:
    """Returns the document if it is not a mapping or has only these fields. Raises UnknownField."""
    if isinstance(document, dict):
        for key in cast("dict[object, object]", document):
            if key not in names:
                raise UnknownField(key, names)
    return cast(object, document)


@dataclass(frozen=True, slots=True, eq=False)
class ParsedBy:
    """Annotates a field that is parsed by `read`, also from a command line's text. `read` raises ValueError with a
    description of valid values. `schema` is what an editor suggests."""

    read: Callable[[object], object]
    schema: dict[str, Any]

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.read)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return dict(self.schema)  # pydantic adds the default of the field to it


def shorthand(field: str, form: Any) -> BeforeValidator:
    """Annotates a mapping for which a text may stand, the value of its `field`: `scorer: json` for `scorer: {name:
    json}`. `form` is what an editor suggests."""

    def read(value: object) -> object:
        return {field: value} if isinstance(value, str) else value

    return BeforeValidator(read, json_schema_input_type=form)


def one_of(*words: str | None) -> ParsedBy:
    """Annotates a field for a text that is one of these words; None stands for the default."""
    known = [None if word is None else str(word) for word in words]

    def read(value: object) -> str | None:
        if not isinstance(value, str | None) or value not in known:
            raise ValueError(f"one of {', '.join(filter(None, known))}")
        return value

    return ParsedBy(read, {"enum": known})


@dataclass(frozen=True, slots=True)
class DocumentProblem:
    """The first error in a document: position, reason and, if known, a next step. `value` is the wrong value, and
    `expected` describes a valid one, if that is the entire problem."""

    loc: Loc
    why: str
    next_step: str = ""
    value: object = None
    expected: str = ""
    unknown: bool = False

    @property
    def path(self) -> str:
        """`inputs[0].weight`; empty for the document itself."""
        return path_of(self.loc)

    def at(self, subject: str) -> str:
        """The field of a document that has this name."""
        return f"{subject}: {self.path}" if self.loc else subject


def problem_of(error: ValidationError) -> DocumentProblem:
    """The first of pydantic's errors, in our words."""
    first = error.errors(include_url=False)[0]
    context, loc = first.get("ctx", {}), tuple(part for part in first["loc"] if part != "[key]")
    match context.get("error"):
        case UnknownField(key=key, names=names):
            near = get_close_matches(key.lower(), names, 1) if isinstance(key, str) else []
            hint = f"Did you mean {near[0]}? " if near else ""
            next_step = f"{hint}Known fields: {', '.join(names)}."
            return DocumentProblem(loc, f"unknown field {printable(key)}", next_step, value=key, unknown=True)
        case ValidationError() as inner:  # of a document in this one
            problem = problem_of(inner)
            return replace(problem, loc=(*loc, *problem.loc))
        case RefusedValues() as refusal:
            return DocumentProblem((*loc, *refusal.path), str(refusal), refusal.next_step)
        case _:
            pass
    match first["type"]:
        case "missing":
            return DocumentProblem(loc, "it is missing")
        case "too_short":
            return DocumentProblem(
                loc, f"it has {context['actual_length']} entries, and at least {context['min_length']} is needed"
            )
        case "too_long":
            count = context["actual_length"] or f"more than {context['max_length']}"  # of a mapping, None
            return DocumentProblem(loc, f"it has {count} entries, and at most {context['max_length']} are allowed")
        case _:
            value, expected = first["input"], _expected(first)
            return DocumentProblem(loc, f"{printable(value)} is not {expected}", value=value, expected=expected)


def _expected(error: ErrorDetails) -> str:
    context = error.get("ctx", {})
    match error["type"]:
        case "literal_error":
            return f"one of {', '.join(_WORD.findall(context['expected'])) or context['expected']}"
        case "value_error":
            return str(context["error"])
        case kind:
            return _MUST_BE[kind].format(**context) if kind in _MUST_BE else error["msg"]


def path_of(loc: Loc) -> str:
    """The path of a field, such as `inputs[0].weight`."""
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        else:
            path += f".{part if part.isidentifier() and len(part) < 100 else printable(part)}"
    return path.removeprefix(".")
