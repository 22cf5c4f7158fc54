"""Suites of the registry, by their names."""

from typing import TYPE_CHECKING
from urllib.parse import quote

from registry.errors import Usage
from registry.sdk.connection import Connection

if TYPE_CHECKING:
    from composer.formats.recipes.suite import Suite


def fetch_suite(connection: Connection, name: str) -> "Suite":
    """Fetches a suite. Raises Usage for text that cannot be a name, before any request, and for a suite whose examples
    the registry does not have."""
    from composer.formats.recipes.suite import Suite
    from registry.wire.quality import SuiteOut

    refuse_bad_suite_name(name)
    document = connection.api.get(f"/v1/suites/{quote(name, safe='')}", SuiteOut)
    if document.task in ("harness", "reported"):
        raise Usage(
            "suite_elsewhere",
            f"The registry does not have the examples of {name}.",
            subject=name,
            next_step=f"Run the task of a harness by its name: `adaptory eval REF --harness {document.name}`."
            if document.task == "harness"
            else "Scores on it are only reported; register a suite with its examples to measure some.",
        )
    return Suite.from_json(document.content, name)


def refuse_bad_suite_name(name: str) -> None:
    """Raises Usage for text that cannot be the name of a suite, or NAME@VERSION."""
    from composer.formats.recipes.suite import NAME, VERSION

    plain, at, version = name.partition("@")
    if not NAME.fullmatch(plain) or (at and not VERSION.fullmatch(version)):
        raise Usage(
            "suite_name",
            f"Invalid suite name {name}: it is written NAME or NAME@VERSION, with lower-case letters, digits, - and _.",
            subject=name,
        )
