"""Addresses on a Hugging Face Hub: hf://ORG/NAME, or hf://ORG/NAME@REVISION."""

import re
from dataclasses import dataclass, replace

from registry.errors import Usage

SCHEME = "hf://"
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_ADDRESS = re.compile(rf"hf://({_PART}(?:/{_PART})?)(?:@([A-Za-z0-9][A-Za-z0-9._/+-]{{0,199}}))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class HubAddress:
    """A repository of models, and a branch, a tag or a commit of it; None is its main branch."""

    repository: str
    revision: str | None = None

    @property
    def pinned(self) -> bool:
        """Whether the address names a commit, which never changes."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None

    @property
    def organisation(self) -> str:
        """The organisation in lower case, since hubs ignore the case."""
        return self.repository.partition("/")[0].lower()

    def at(self, revision: str) -> "HubAddress":
        """The same repository at another revision."""
        return replace(self, revision=revision)

    def __str__(self) -> str:
        return f"{SCHEME}{self.repository}" + (f"@{self.revision}" if self.revision else "")


def parse_hub_address(text: str) -> HubAddress:
    """Raises Usage for anything else."""
    match = _ADDRESS.fullmatch(text)
    if match is None or ".." in text or "--" in match.group(1):
        raise Usage(
            "bad_hub_address", f"{text[:200]!r} does not name a repository of a Hugging Face Hub.", subject=text[:200]
        )
    return HubAddress(*match.groups())
