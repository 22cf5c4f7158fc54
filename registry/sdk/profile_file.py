"""The file of registries that this user has logged in to.

`$ADAPTORY_HOME/profiles.json`, readable only by its owner, maps names to a URL and a token, and names the one in use.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkstemp
from typing import Any, cast

from registry.errors import Invalid, NotFound
from registry.formats.references import nearest

LOCAL = "local"
"""The embedded registry; no profile can have this name."""
_FILE_BYTES = 1_000_000


@dataclass(frozen=True, slots=True)
class Profile:
    """A saved registry: its URL and, if it has one, its token."""

    name: str
    url: str
    token: str | None


class Profiles:
    """The profiles in a file. Raises Invalid for a file that is damaged or that others may read."""

    def __init__(self, home: Path) -> None:
        self._path = (home / "profiles.json").resolve()  # follow a link: logout must remove the token in its target
        self.current: str | None = None
        self.known: dict[str, Profile] = {}
        if self._path.exists():
            self._read()

    def find(self, name: str) -> Profile:
        """The profile of that name. Raises NotFound, with the nearest name."""
        if name not in self.known:
            step = nearest(name, self.known, "`adaptory profile list` shows them, `adaptory login URL` makes one.")
            raise NotFound("profile_unknown", f"The profile {name!r} does not exist.", subject=name, next_step=step)
        return self.known[name]

    def save(self) -> None:
        """Replaces the file atomically; it is never readable by others."""
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        rows = {profile.name: {"url": profile.url, "token": profile.token} for profile in self.known.values()}
        descriptor, name = mkstemp(dir=self._path.parent, prefix=".profiles.")  # mode 0600, always a new file
        staging = Path(name)
        try:
            with os.fdopen(descriptor, "w") as file:
                json.dump({"current": self.current, "profiles": rows}, file, indent=2)
            staging.replace(self._path)
        except BaseException:
            staging.unlink()
            raise

    def _read(self) -> None:
        from registry.environment.network import registry_url
        from registry.environment.settings import stripped_token

        if self._path.stat().st_mode & 0o077:
            raise self._bad("others may read it", f"Run chmod 600 {self._path}, and create new tokens.")
        try:
            with self._path.open("rb") as file:
                document = cast("dict[str, Any]", json.loads(file.read(_FILE_BYTES)))
            self.current = cast("str | None", document["current"])
            for name, row in document["profiles"].items():
                token = stripped_token(row["token"]) if row["token"] is not None else None
                self.known[name] = Profile(name, registry_url(row["url"]), token)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._bad("it is not a list of profiles", f"Remove {self._path} and log in again.") from error

    def _bad(self, why: str, next_step: str) -> Invalid:
        return Invalid("bad_profiles", f"{self._path}: {why}.", subject=str(self._path), next_step=next_step)
