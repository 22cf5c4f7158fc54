"""A server that watches a directory: `DIR/by-version` is what it has loaded."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from registry.agent.directory import MirrorDirectory
from registry.agent.servers.protocol import CheckResult, Endpoint
from registry.agent.versions import ServedVersion
from registry.formats.evidence import EvidenceExample


class DirectoryServer:
    """Adds and removes directories in `DIR/by-version`, such as those that vLLM's file-system resolver looks up."""

    kind = "directory"
    problem = ""

    def __init__(self, directory: MirrorDirectory, base_name: str | None) -> None:
        self._directory, self._base_name = directory, base_name
        self.address = str(directory.root / "by-version")

    def close(self) -> None:
        pass

    def loaded(self) -> Mapping[str, str]:
        return {name: str(path) for name, path in self._directory.named_versions()}

    def endpoint(self, name: str) -> Endpoint:
        del name  # this address is not for requests
        return Endpoint(self.address)

    def load(self, version: ServedVersion, directory: Path) -> None:
        del directory  # links to it
        self._directory.make_version(version, self._base_name)

    def unload(self, name: str) -> None:
        self._directory.remove_version(name)

    def busy(self) -> None:
        return None

    def check(self, name: str, evidence: Sequence[EvidenceExample] | None = None) -> CheckResult:
        del evidence  # this kind has no log-probabilities
        return CheckResult("unproved") if name in self.loaded() else CheckResult("failed", f"{name} is gone.")
