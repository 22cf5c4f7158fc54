"""Shortens paths in texts that are shown on other machines."""

import re
from collections.abc import Collection, Mapping
from typing import Any

_PATH = re.compile(
    r"""
    (?: (?<![\w:/.~…-]) | (?<=:)(?!//) | (?<=:)//(?=//) )   # begins here, also in `error:/srv` and `sqlite:////srv`
    (file://)? /+ (?!v1/)
    (?: [^\s/'"(),;:]+/ )+ (?= [^\s/'"(),;:] )
    """,
    re.VERBOSE,
)


def without_directories(text: str, known: Collection[str] = ()) -> str:
    """The text with only the last part of each absolute path: `/srv/bases/tiny/config.json` becomes `…/config.json`.
    Addresses with a host stay. `known` are directories whose names may have blanks, where a text does not show where a
    path ends."""
    for directory in sorted(known, key=len, reverse=True):
        if directory.strip("/"):
            text = text.replace(f"{directory.rstrip('/')}/", "…/")
    return _PATH.sub(r"\1…/", text)


def document_without_directories(value: Any, known: Collection[str] = ()) -> Any:
    """A JSON document with all its texts shortened by `without_directories`."""
    match value:
        case str():
            return without_directories(value, known)
        case list():
            return [document_without_directories(item, known) for item in value]  # pyright: ignore[reportUnknownVariableType]
        case Mapping():
            return {name: document_without_directories(item, known) for name, item in value.items()}  # pyright: ignore[reportUnknownVariableType]
        case _:
            return value
