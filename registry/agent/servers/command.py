"""A server behind a command: JSON on its stdin, JSON on its stdout, success by its exit code."""

import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, cast

from registry.agent.servers.protocol import MAX_ANSWER_BYTES, CheckResult, Endpoint, words_of
from registry.agent.versions import ServedVersion
from registry.errors import Refused, RegistryError, Unavailable
from registry.formats.evidence import EvidenceExample

TIMEOUT_S = 120.0
_POLL_S = 0.02
_MAX_TEXT = 300


class CommandServer:
    """Runs `CMD` with `{"do": "loaded" | "load" | "unload" | "busy" | "check", "name": …, "directory": …}`.

    `loaded` prints an object of names with their paths, `busy` a list of names. Any exit code but 0 is a refusal, and
    what the command wrote to stderr is the reason.
    """

    kind = "exec"
    problem = ""

    def __init__(self, command: str) -> None:
        self.address, self._command = command, words_of(command)

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
        with TemporaryFile() as given, TemporaryFile() as printed, TemporaryFile() as said:
            given.write(json.dumps(request).encode())
            given.seek(0)
            ended = self._ended(request["do"], given, printed, said)
            said.seek(max(0, os.fstat(said.fileno()).st_size - _MAX_TEXT))
            why = said.read().decode(errors="replace").strip() or "nothing on stderr"
            if ended:
                detail = f"{self.address} {request['do']} ended with {ended}: {why}"
                raise Refused("server_refused", detail, subject=self.address)
            printed.seek(0)
            text = printed.read(MAX_ANSWER_BYTES).decode(errors="replace")
        try:
            return json.loads(text) if text.strip() else None
        except (ValueError, RecursionError) as error:
            raise self._unusable(request["do"], "JSON") from error

    def _ended(self, what: str, given: IO[bytes], printed: IO[bytes], said: IO[bytes]) -> int:
        """The exit code of the command. Its output goes to files, since a process that it leaves running, such as a
        server, would keep a pipe open. Raises Unavailable if it cannot be run, takes too long or prints too much."""
        until_s = time.monotonic() + TIMEOUT_S
        try:
            running = subprocess.Popen(self._command, stdin=given, stdout=printed, stderr=said)  # noqa: S603 - the operator's own
        except OSError as error:
            detail = f"{self.address} {what} cannot be run: {error}."
            raise Unavailable("server_unreachable", detail, subject=self.address) from error
        with running:
            while running.poll() is None:
                is_long = max(os.fstat(file.fileno()).st_size for file in (printed, said)) > MAX_ANSWER_BYTES
                if is_long or time.monotonic() > until_s:
                    running.kill()
                    within = f"{TIMEOUT_S:g} seconds and {MAX_ANSWER_BYTES:,} bytes"
                    detail = f"{self.address} {what} does not end within {within}."
                    raise Unavailable("server_unreachable", detail, subject=self.address)
                time.sleep(_POLL_S)
            return running.returncode

    def _unusable(self, what: str, wanted: str) -> Unavailable:
        return Unavailable(
            "server_unreachable", f"{self.address} must print {wanted} for {what}.", subject=self.address
        )
