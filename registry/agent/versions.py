"""A version of an adapter, as servers and routes name it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from composer.formats.sets.adapter_set import SetMember
from registry.client.api import untrusted
from registry.errors import RegistryError
from registry.formats.references import RepositoryName, parse_repository, parse_version
from registry.wire.quality import FollowedOut

ALL = 100
"""The weight of a channel's only version."""
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


def weights_of(channel: str, served: FollowedOut) -> Mapping[ServedVersion, int]:
    """The versions to which a channel's requests go, in per cent: what it serves, then a canary's candidate; empty for
    nothing. Raises Invalid for a version or a commit of another form: both become parts of local paths."""
    if served.version is None or served.commit is None:
        return {}
    beside = served.candidate
    if beside is None or not 0 < beside.weight < ALL:
        return {_version(channel, served.move, served.version, served.commit): ALL}
    return {
        _version(channel, served.move, served.version, served.commit): ALL - beside.weight,
        _version(channel, served.move, beside.version, beside.commit): beside.weight,
    }


def member_version(member: SetMember) -> ServedVersion:
    """The release of a set's member. Raises Invalid for a version that is none."""
    return ServedVersion(member.repository, _parsed(member.version), member.commit)


def _parsed(version: str) -> str:
    try:
        return str(parse_version(version))
    except RegistryError as error:
        raise untrusted("bad_answer", error.detail) from error


def _version(channel: str, move: int, version: str, commit: str) -> ServedVersion:
    parsed = _parsed(version)
    if move < 1 or not is_commit(commit):
        raise untrusted(
            "bad_answer",
            f"{channel}: commit {commit[:100]!r} lacks 40 hex digits, or move {move} is less than 1",
        )
    return ServedVersion(channel.partition("@")[0], parsed, commit)
