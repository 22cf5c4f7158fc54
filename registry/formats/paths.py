"""Paths in texts that people elsewhere read."""

import re
from collections.abc import Mapping
from typing import Any

_PATH = re.compile(r"(?<![\w:/.~-])(file://)?/(?!v1/)(?:[^\s/'\"(),;:]+/)+(?=[^\s/'\"(),;:])")


def without_directories(text: str) -> str:
    """The text with only the last part of each absolute path: `/srv/bases/tiny/config.json` becomes `…/config.json`.
    Addresses with a host stay."""
    return _PATH.sub(r"\1…/", text)


def document_without_directories(value: Any) -> Any:
    """A JSON document with all its texts so."""
    match value:
        case str():
            return without_directories(value)
        case list():
            return [document_without_directories(one) for one in value]  # pyright: ignore[reportUnknownVariableType]
        case Mapping():
            return {name: document_without_directories(one) for name, one in value.items()}  # pyright: ignore[reportUnknownVariableType]
        case _:
            return value
