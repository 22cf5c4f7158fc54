"""What a registry has on disk and in its lists: for tests that ask what a failure left behind."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from registry.cli.connect import connected
from registry.client.api import Api
from tests.scenarios.world import Cli, environment


def home_of(cli: Cli) -> Path:
    """The registry's own directory, be it embedded or served by the `cli` fixture's server."""
    home = Path(cli.environment["ADAPTORY_HOME"])
    return home.with_name("server") if "ADAPTORY_URL" in cli.environment else home


@contextmanager
def api_of(cli: Cli) -> Generator[Api]:
    """Calls without the command line's own checks."""
    with environment(cli.environment, ["adaptory"]), connected() as connection:
        yield connection.api


@dataclass(frozen=True)
class Traces:
    """`work` are unfinished files of the registry: uploads, inspections, compositions, puts."""

    blobs: frozenset[str]
    work: frozenset[str]
    releases: tuple[str, ...]


def traces(cli: Cli) -> Traces:
    home = home_of(cli)
    with api_of(cli) as api:
        releases = [
            f"{release['repository']}:{release['version']}"
            for kind in ("adapter", "model")
            for release in api.pages("/v1/releases", kind=kind, include_yanked=True)
        ]
    blobs = frozenset(path.name for path in (home / "store" / "blobs").rglob("*") if path.is_file())
    unfinished = [path for place in ("work", "store/incoming") for path in (home / place).rglob("*")]
    return Traces(blobs, frozenset(str(path.relative_to(home)) for path in unfinished), tuple(sorted(releases)))
