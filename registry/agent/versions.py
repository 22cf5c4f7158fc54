"""A version of an adapter, as servers and routes name it."""

import re
from dataclasses import dataclass

from registry.client.api import untrusted
from registry.errors import RegistryError
from registry.formats.references import RepositoryName, parse_repository, parse_version
from registry.wire.quality import FollowedOut

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True, order=True)
class ServedVersion:
    """A release that a server loads: its repository, version and commit."""

    repository: str
    version: str
    commit: str

    @property
    def name(self) -> str:
        """The name that a server loads it under, such as acme/sql@1.2.0."""
        return f"{self.repository}@{self.version}"

    @property
    def reference(self) -> str:
        return f"{self.repository}:{self.version}"


def parse_served(name: str) -> tuple[RepositoryName, str] | None:
    """The repository and version of a served version's name; None for any other name."""
    repository, _, version = name.partition("@")
    try:
        return parse_repository(repository), str(parse_version(version))
    except RegistryError:
        return None


def is_commit(text: str) -> bool:
    return _COMMIT.fullmatch(text) is not None


def served_by(channel: str, served: FollowedOut) -> ServedVersion | None:
    """The version that a channel serves; None for nothing. Raises Invalid for a version or a commit of another form:
    both become parts of local paths."""
    if served.version is None or served.commit is None:
        return None
    try:
        version = str(parse_version(served.version))
    except RegistryError as error:
        raise untrusted("bad_answer", error.detail) from error
    if served.move < 1 or not is_commit(served.commit):
        raise untrusted(
            "bad_answer",
            f"{channel}: commit {served.commit[:100]!r} lacks 40 hex digits, or move {served.move} is less than 1",
        )
    return ServedVersion(channel.partition("@")[0], version, served.commit)
