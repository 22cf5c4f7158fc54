"""Connects to a registry: over HTTP, or the embedded one in this process. One code path."""

import os
import re
import threading
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from registry.environment.home import with_secret
from registry.errors import Unavailable, Usage
from registry.sdk.profile_file import LOCAL, Profiles

if TYPE_CHECKING:
    from registry.client.api import Api, Token
    from registry.environment.settings import Settings
    from registry.transfer.resources import Resources

EMBEDDED_URL = "http://localhost"
_ALIKE = 0.94  # similarity of two names: one letter wrong, missing or too many


@dataclass(frozen=True, slots=True)
class Connection:
    """An open registry. `resources` is set for the embedded one, whose jobs this process must run itself."""

    api: "Api"
    settings: "Settings"
    resources: "Resources | None"

    @property
    def cache(self) -> Path:
        return self.settings.home_directory / "cache"

    @contextmanager
    def worker(self, job: int | None) -> Generator[None]:
        """Runs this job of the embedded registry in a thread meanwhile; a remote registry has its own workers. Others'
        jobs in the same database are left to workers, with their settings; with None, no job runs."""
        if self.resources is None:
            yield
            return
        from registry.worker.runner import run_worker
        from registry.worker.steps import KINDS

        stop = threading.Event()
        run = partial(run_worker, self.resources, KINDS if job is not None else {}, stop, only=job)
        thread = threading.Thread(target=run, name="worker")
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def load_settings(**given: str | None) -> "Settings":
    """The settings from the environment, or as given. Raises Usage for an invalid value or a misspelt variable."""
    from pydantic import ValidationError
    from pydantic_settings import SettingsError

    from registry.environment.settings import Settings

    _refuse_misspelt(Settings.variables())
    try:
        return Settings(**given)  # pyright: ignore[reportArgumentType]
    except ValidationError as error:
        name = _variable(error.errors()[0]["loc"])
        messages = [str(problem["msg"]) for problem in error.errors() if _variable(problem["loc"]) == name]
        raise Usage(
            "bad_setting",
            f"{name}: {', or: '.join(messages)}.",
            subject=name,
            next_step="Correct the environment variable.",
        ) from error
    except SettingsError as error:  # a group of settings in one variable that is not JSON
        name = _variable(tuple(re.findall(r'field "(\w+)"', str(error))))
        raise Usage(
            "bad_setting",
            f"{name} must be a JSON object.",
            subject=name,
            next_step=f"Remove it, and set each of its settings by itself: {name}__KIND, for one.",
        ) from error


def _refuse_misspelt(known: set[str]) -> None:
    """Raises Usage for a misspelt setting: `ADAPTORY_ACESS=tokens` would otherwise leave a server open. Other unknown
    names pass: container runtimes set some of their own (`ADAPTORY_PORT` for a service of that name), but none of the
    form `ADAPTORY_STORAGE__ENDPOINT`."""
    unknown = sorted(name for name in os.environ if name.upper().startswith("ADAPTORY_") and name.upper() not in known)
    if not unknown:
        return
    from difflib import get_close_matches

    for name in unknown:
        nested = "__" in name
        candidates = [candidate for candidate in known if "__" in candidate] if nested else known
        if meant := get_close_matches(name.upper(), candidates, n=1, cutoff=0.0 if nested else _ALIKE):
            raise Usage(
                "unknown_setting",
                f"Unknown setting {name}.",
                subject=name,
                next_step=f"Set {meant[0]} if you meant that, and remove {name} from the environment.",
            )


@contextmanager
def open_registry(
    settings: "Settings", announce: Callable[[str], None] = lambda _registry: None
) -> Generator[Connection]:
    """Opens the registry that the settings name: the one of a profile or URL, else the embedded one.

    `announce` is called once, before the first change, with what the registry is. Raises NotFound for an unknown
    profile, Unavailable if the embedded registry's directory cannot be used.
    """
    from registry.client.api import Api

    with ExitStack() as stack:
        if remote := _remote(settings):
            url, token, name = remote
            api = Api(url, token=token, on_change=cache(partial(announce, f"{url}{name}")))
            stack.callback(api.close)
            yield Connection(api, settings, None)
            return
        from registry.api.app import create_app
        from registry.client.inprocess import InProcessTransport
        from registry.transfer.resources import open_resources

        try:
            resources = open_resources(settings)
        except OSError as error:
            path = Path(error.filename or settings.home_directory)
            name = "HOME" if path.is_relative_to(settings.home_directory) else "STORAGE__DIRECTORY"
            raise Unavailable(
                "home_unusable",
                f"{path} cannot be used: {error.strerror}.",
                subject=str(path),
                next_step=f"Set ADAPTORY_{name}.",
            ) from error
        stack.callback(resources.close)
        transport = InProcessTransport(create_app(resources, on_demand=True))
        api = Api(EMBEDDED_URL, transport, on_change=cache(partial(announce, f"local, {_embedded(settings)}")))
        stack.callback(api.close)
        yield Connection(api, settings, resources)


def _remote(settings: "Settings") -> tuple[str, "Token", str] | None:
    """URL, token and profile name of the registry to use; None for the embedded one. The token of a server for one
    user is its secret, if it runs from the same home."""
    if settings.profile is None and settings.url:
        token = settings.token.get_secret_value() if settings.token else None
        return (*_signed_in(settings, settings.url, token), "")
    if settings.profile == LOCAL:
        return None
    profiles = Profiles(settings.home_directory)
    name = settings.profile or profiles.current
    if name is None:
        return None
    profile = profiles.find(name)
    return (*_signed_in(settings, profile.url, profile.token), f" (profile {name})")


def _signed_in(settings: "Settings", url: str, token: str | None) -> tuple[str, "Token"]:
    """The address and the token to send there: the one given, or else the secret of the server that runs then."""
    if token:
        return url, token
    home = settings.home_directory
    return with_secret(home, url)[0], lambda: with_secret(home, url)[1]


def _embedded(settings: "Settings") -> str:
    """The place of the embedded registry's rows: the home, or the database without its credentials."""
    if settings.database_url is None:
        return str(settings.home_directory)
    url = urlsplit(settings.database_url)
    return f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}"


def _variable(location: tuple[int | str, ...]) -> str:
    """The environment variable of a setting. The location of a storage setting also has the storage kind, which the
    variable's name lacks."""
    parts = [str(part) for part in location]
    if parts[0] == "storage" and len(parts) > 2:
        parts = [parts[0], parts[2]]
    return f"ADAPTORY_{'__'.join(parts[:2])}".upper()
