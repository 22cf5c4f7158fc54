"""JSON with the same value."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, NoReturn, cast

from composer.formats.recipes.suite import Example
from composer.formats.recipes.tasks import JsonSettings

MAX_CHARS = 100_000
MAX_DEPTH = 100
_FENCED = re.compile(r"\s*```[a-z]{0,10}\n(.*?)\n?```\s*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class JsonMatch:
    """1 if answer and completion are JSON with the same value, else 0. The order of keys, white space and the writing
    of numbers don't matter; a list's order does. An answer may be enclosed in one Markdown fence.

    An answer that is longer than MAX_CHARS, deeper than MAX_DEPTH, has a key twice or a number that JSON lacks is
    wrong. Time and memory are proportional to its length.
    """

    settings: JsonSettings

    def __call__(self, answer: str, example: Example) -> float:
        """Raises ValueError if the completion is not such JSON: no answer would be right."""
        try:
            wanted = parsed(example.completion)
        except ValueError as error:
            raise ValueError(f"the completion {example.completion[:60]!r} is not JSON") from error
        try:
            fenced = _FENCED.fullmatch(answer) if len(answer) <= MAX_CHARS else None
            return float(parsed(fenced.group(1) if fenced else answer) == wanted)
        except ValueError:
            return 0.0


def parsed(text: str) -> object:
    """The value as nested tuples that are equal if the JSON values are. Raises ValueError for anything else."""
    if len(text) > MAX_CHARS:
        raise ValueError("too long")
    try:
        value = json.loads(
            text,
            parse_int=_number,
            parse_float=_number,
            parse_constant=_refuse_constant,
            object_pairs_hook=_unique,
        )
    except RecursionError as error:
        raise ValueError("too deep") from error
    return _comparable(value, 0)


def _number(text: str) -> Decimal:
    try:
        return Decimal(text)
    except InvalidOperation as error:  # an exponent beyond 10^18 digits
        raise ValueError("not a number") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key twice")
    return values


def _comparable(value: object, depth: int) -> object:
    """The value with the type of each part: in Python, True equals 1."""
    if depth > MAX_DEPTH:
        raise ValueError("too deep")
    if isinstance(value, Mapping):
        items = cast("Mapping[str, object]", value).items()
        return "object", tuple(sorted((key, _comparable(item, depth + 1)) for key, item in items))
    if isinstance(value, list):
        return "array", tuple(_comparable(item, depth + 1) for item in cast("list[object]", value))
    return type(value).__name__, value
