"""A version of an adapter, as servers and routes name it."""

from dataclasses import dataclass

from registry.errors import RegistryError
from registry.formats.references import RepositoryName, parse_repository, parse_version


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
