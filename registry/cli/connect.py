"""The registry that a command works on: from the settings, over HTTP or in this process."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.errors import NotFound, Usage
from registry.formats.references import parse_reference
from registry.sdk.connection import Connection, load_settings, open_registry

if TYPE_CHECKING:
    from composer.formats.checkpoints.checkpoint import Checkpoint
    from registry.settings import Settings


def own_settings() -> "Settings":
    """Settings of the registry whose database and store this machine can reach. Raises Usage if a URL names another."""
    settings = load_settings()
    if (settings.url and settings.profile is None) or settings.profile not in (None, "local"):
        raise Usage(
            "not_remote",
            "This command needs the registry's database and store.",
            subject="ADAPTORY_PROFILE" if settings.profile else "ADAPTORY_URL",
            next_step="Run it where the server runs, without ADAPTORY_URL and --profile.",
        )
    return settings


def _announce(registry: str) -> None:
    from registry.cli import render

    render.say(f"registry: {registry}")


@contextmanager
def connected() -> Generator[Connection]:
    """The registry that the settings name. The first change says which one it is."""
    with open_registry(load_settings(), _announce) as connection:
        yield connection


def resolved(connection: Connection, ref: str, *, warned: bool = False) -> dict[str, Any]:
    """The release that `ref` names. Prints its warning unless `warned`."""
    from registry.cli import render

    reference = parse_reference(ref)
    resolution = connection.api.resolve(reference)
    if resolution["warning"] and not warned:
        render.say(f"warning: {resolution['warning']}")
    return resolution["release"]


def release_directory(connection: Connection, release: dict[str, Any]) -> Path:
    """The directory of the release's files on this machine, just verified."""
    from registry.cli import render
    from registry.client.pull import cached

    with render.progress(f"pull {release['repository']}:{release['version']}", total_bytes(release)) as done:
        return cached(connection.api, release, connection.cache, done)


def total_bytes(release: dict[str, Any]) -> int:
    """Total size of a release's files. Raises Invalid for a malformed answer."""
    from registry.client.api import understood

    with understood():
        return sum(row["size_bytes"] for row in release["files"])


def base_checkpoint(base: dict[str, Any], override: Path | None) -> "Checkpoint":
    """The base's weights on this machine, verified by hash: a path does not prove what was measured."""
    from composer.formats.checkpoints.checkpoint import local_directory, open_checkpoint
    from composer.formats.checkpoints.hashing import verify_checkpoint

    directory = override or local_directory(base["locations"])
    if directory is None:
        raise NotFound(
            "base_not_here",
            f"No location of {base['name']} is on this machine.",
            subject=base["name"],
            next_step="Name its directory with --base-dir, or run `adaptory base add DIR` here.",
        )
    from registry.cli import render

    checkpoint = open_checkpoint(directory)
    total = sum(header.size_bytes for header in checkpoint.shards.values())
    with render.progress(f"verify {base['name']}", total) as done:
        verify_checkpoint(checkpoint, base["digest"], done)
    return checkpoint
