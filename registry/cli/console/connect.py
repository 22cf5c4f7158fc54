"""The registry that a command works on: from the settings, over HTTP or in this process."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from registry import wire
from registry.errors import Usage
from registry.sdk import local_files
from registry.sdk.connection import Connection, load_settings, open_registry

if TYPE_CHECKING:
    from composer.formats.checkpoints.checkpoint import Checkpoint
    from registry.environment.settings import Settings


def own_settings() -> "Settings":
    """Settings of the registry whose database and store this machine can reach. Raises Usage if a URL names another."""
    settings = load_settings()
    if (settings.url and settings.profile is None) or settings.profile not in (None, "local"):
        raise Usage(
            "not_remote",
            "This command needs the registry's database and store.",
            subject="ADAPTORY_PROFILE" if settings.profile else "ADAPTORY_URL",
        )
    return settings


def _announce(registry: str) -> None:
    from registry.cli.console import render

    render.say(f"registry: {registry}")


@contextmanager
def connected() -> Generator[Connection]:
    """The registry that the settings name. The first change announces which one it is."""
    with open_registry(load_settings(), _announce) as connection:
        yield connection


@contextmanager
def jobs_running(connection: Connection, job: int | None) -> Generator[None]:
    """Runs this job of the embedded registry meanwhile; with None, only judges the promotions that wait."""
    with connection.worker(job):
        yield


def resolved(connection: Connection, ref: str, *, warned: bool = False) -> "wire.search.ResolvedRelease":
    """The release that `ref` names. Prints its warning unless `warned`."""
    from registry.cli.console import render

    return local_files.resolved(connection, ref, (lambda _message: None) if warned else render.warn)


def release_directory(connection: Connection, release: "wire.search.AnyRelease") -> Path:
    """The directory of the release's files on this machine, just verified."""
    from registry.cli.console import render

    return local_files.release_directory(connection, release, render)


def base_checkpoint(base: "wire.catalog.BaseOut", override: Path | None) -> "Checkpoint":
    """The base's weights on this machine, verified by hash."""
    from registry.cli.console import render

    return local_files.base_checkpoint(base, override, render)
