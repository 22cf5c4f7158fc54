"""A server behind a command: JSON on its stdin, JSON on its stdout, success by its exit code."""

import json
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from registry.agent.servers.protocol import CheckResult, Endpoint
from registry.agent.versions import ServedVersion
from registry.errors import Refused, RegistryError, Unavailable
from registry.formats.evidence import EvidenceExample

TIMEOUT_S = 120.0
_MAX_TEXT = 300


class CommandServer:
    """Runs `CMD` with `{"do": "loaded" | "load" | "unload" | "busy" | "check", "name": …, "directory": …}`.

    `loaded` prints an object of names with their paths, `busy` a list of names. Any exit code but 0 is a refusal, and
    what the command wrote to stderr is the reason.
    """

    kind = "exec"
    problem = ""

    def __init__(self, command: str) -> None:
        self.address, self._command = command, shlex.split(command)

    def close(self) -> None:
        pass

    def loaded(self) -> Mapping[str, str]:
        answer = self._run({"do": "loaded"})
        if not isinstance(answer, dict):
            raise self._unusable("loaded", "an object of names and paths")
        return {str(name): str(path) for name, path in cast(dict[str, Any], answer).items() if name}

    def endpoint(self, name: str) -> Endpoint:
        del name  # this address is not for requests
        return Endpoint(self.address)

    def load(self, version: ServedVersion, directory: Path) -> None:
        self._run({"do": "load", "name": version.name, "directory": str(directory), "commit": version.commit})

    def unload(self, name: str) -> None:
        self._run({"do": "unload", "name": name})

    def busy(self) -> frozenset[str]:
        answer = self._run({"do": "busy"})
        if not isinstance(answer, list):
            raise self._unusable("busy", "a list of names")
        return frozenset(map(str, cast(list[Any], answer)))

    def check(self, name: str, evidence: Sequence[EvidenceExample] | None = None) -> CheckResult:
        del evidence  # this kind has no log-probabilities
        try:
            self._run({"do": "check", "name": name})
        except RegistryError as error:
            return CheckResult("failed", error.detail)
        return CheckResult("unproved")

    def _run(self, request: Mapping[str, str]) -> Any:
        """Runs the command. Returns its document, or None if it printed nothing."""
        what = f"{self.address} {request['do']}"
        try:
            ended = subprocess.run(  # noqa: S603 - the operator's own command
                self._command,
                input=json.dumps(request),
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=TIMEOUT_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Unavailable("server_unreachable", f"{what} cannot be run: {error}.", subject=self.address) from error
        if ended.returncode:
            said = ended.stderr.strip()[-_MAX_TEXT:] or "nothing on stderr"
            raise Refused("server_refused", f"{what} ended with {ended.returncode}: {said}", subject=self.address)
        try:
            return json.loads(ended.stdout) if ended.stdout.strip() else None
        except (ValueError, RecursionError) as error:
            raise self._unusable(request["do"], "JSON") from error

    def _unusable(self, what: str, wanted: str) -> Unavailable:
        return Unavailable(
            "server_unreachable", f"{self.address} must print {wanted} for {what}.", subject=self.address
        )
