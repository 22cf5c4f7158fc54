"""Shell completion of references and names. Completes nothing if the registry does not answer."""

from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

from registry import wire
from registry.cli.console.connect import connected
from registry.errors import RegistryError

if TYPE_CHECKING:
    from registry.wire.document import Wire

Row = TypeVar("Row", bound="Wire")

_MOST = 200


def references(incomplete: str) -> list[str]:
    """`acme/s` -> repositories; `acme/sql:` -> its versions; `acme/sql@` -> its channels."""
    for mark in ":@":
        repository, separator, _ = incomplete.partition(mark)
        if separator:
            names = _versions(repository) if mark == ":" else _channels(repository)
            return [name for name in names if name.startswith(incomplete)]
    return [row.repository for row in _repositories() if row.repository.startswith(incomplete)][:_MOST]


def channels(incomplete: str) -> list[str]:
    """`acme/sql@prod`."""
    names = [f"{row.repository}@{name}" for row in _repositories() for name in row.channels]
    return [name for name in names if name.startswith(incomplete)][:_MOST]


def channel_names(incomplete: str) -> list[str]:
    """`prod`, for --to."""
    names = {name for row in _repositories() for name in row.channels}
    return sorted(name for name in names if name.startswith(incomplete))[:_MOST]


def suites(incomplete: str) -> list[str]:
    return [suite.name for suite in _suites() if suite.name.startswith(incomplete)][:_MOST]


def harness_tasks(incomplete: str) -> list[str]:
    """The tasks of a harness that this registry has scores on: the harness' own list needs seconds to read."""
    begun, comma, last = incomplete.rpartition(",")
    names = [suite.name for suite in _suites() if suite.task == "harness" and suite.name.startswith(last)]
    return [f"{begun}{comma}{name}" for name in names][:_MOST]


def bases(incomplete: str) -> list[str]:
    """Names and aliases."""
    names = {name for base in _rows("/v1/bases", wire.catalog.BaseOut) for name in (base.name, *base.aliases)}
    return sorted(name for name in names if name.startswith(incomplete))[:_MOST]


def methods(incomplete: str) -> list[str]:
    from composer.formats.recipes.methods import PIPELINES

    return [name for name in PIPELINES if name.startswith(incomplete)]


def _versions(repository: str) -> list[str]:
    rows = [
        row
        for kind in ("adapters", "models", "sets")
        for row in _rows(f"/v1/{kind}/{repository}/releases", wire.catalog.NamedRelease)
    ]
    return [row.name for row in rows]


def _channels(repository: str) -> list[str]:
    rows = [row for row in _repositories() if row.repository == repository]
    return [f"{repository}@{name}" for row in rows for name in row.channels]


def _repositories() -> "list[wire.catalog.RepositoryOut]":
    return [row for kind in ("adapters", "models", "sets") for row in _rows(f"/v1/{kind}", wire.catalog.RepositoryOut)]


def _suites() -> "list[wire.quality.SuiteOut]":
    return _rows("/v1/suites", wire.quality.SuiteOut)


def _rows(path: str, row: type[Row]) -> list[Row]:
    rows: list[Row] = []
    with suppress(RegistryError), connected() as connection:
        rows += connection.api.pages(path, row)
    return rows
