"""The operations of an agent on a server of any kind."""

import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import httpx2

from registry.agent.versions import ServedVersion
from registry.errors import Refused, RegistryError, Unavailable, Usage
from registry.formats.evidence import EvidenceExample, Served

_MAX_TEXT = 300
LOOK_S, CHANGE_S, CHECK_S = 10.0, 120.0, 120.0
"""The time for an answer. A server reads an adapter's files before it answers, and a check waits behind running
requests."""
MAX_ANSWER_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class CheckResult:
    """Whether a server applies a version: `proved`, `unproved` (it answers under the name, and no more is known), or
    `failed` and why. `served` has the figures of a check that compared answers with evidence."""

    verdict: Literal["proved", "unproved", "failed"]
    why: str = ""
    served: Served | None = None


def compared(address: str, name: str, served: Served, *, loosely: bool = False) -> CheckResult:
    """The result of a check that has compared answers with evidence, `loosely` as for `Served.verdict`."""
    verdict = served.verdict(loosely=loosely)
    does = {"proved": "", "unproved": "may apply", "failed": "does not apply"}[verdict]
    return CheckResult(verdict, does and f"{address} {does} {name}: {served}.", served)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where requests to a version go. `lora` has the scale of each adapter of that server, by id, if every request must
    state them all; `base` is the name of the base there, empty if it needs none."""

    url: str
    lora: tuple[float, ...] | None = None
    base: str = ""


def words_of(command: str) -> list[str]:
    """The words of a command, as a shell reads them. Raises Usage for an empty one, or an open quotation mark."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise Usage("bad_server", f"--server {command}: {error}.", subject=command) from error
    if not words:
        raise Usage("bad_server", "--server names no command.", subject=command)
    return words


class Server(Protocol):
    """A server. Every method raises Unavailable if the server does not answer, and Refused, with the server's words, if
    it refuses."""

    @property
    def kind(self) -> str: ...

    @property
    def address(self) -> str: ...

    @property
    def problem(self) -> str:
        """The problem at the last `loaded`, although versions are served; empty if nothing was."""
        ...

    def loaded(self) -> Mapping[str, str]:
        """The names that the server has loaded, each with the path that it was loaded from."""
        ...

    def endpoint(self, name: str) -> Endpoint:
        """Where requests to a loaded name go."""
        ...

    def load(self, version: ServedVersion, directory: Path) -> None:
        """Loads the version under its name."""
        ...

    def unload(self, name: str) -> None:
        """Unloads the name, which no request uses. Does nothing if the name is not loaded."""
        ...

    def busy(self) -> frozenset[str] | None:
        """The names that running and waiting requests use; None if this kind cannot know."""
        ...

    def check(self, name: str, evidence: Sequence[EvidenceExample] | None = None) -> CheckResult:
        """Requests an answer under the name, and compares the server's tokens with the evidence. Without
        evidence, nothing is proved."""
        ...

    def close(self) -> None: ...


class HttpServer:
    """Requests to a server, with its failures as errors."""

    problem = base = ""

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        self._http = httpx2.Client(base_url=self.address)

    def close(self) -> None:
        self._http.close()

    def endpoint(self, name: str) -> Endpoint:
        """The server's own address: it knows all names."""
        del name
        return Endpoint(self.address, base=self.base)

    def request(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, within_s: float | None = None
    ) -> httpx2.Response:
        """The answer, whatever its status. Raises Unavailable without one, or if it does not end in time."""
        within_s = within_s or (LOOK_S if method == "GET" else CHANGE_S)
        until_s, content = time.monotonic() + within_s, bytearray()
        try:
            timeout = httpx2.Timeout(LOOK_S, read=within_s)
            with self._http.stream(method, path, json=body, timeout=timeout) as answer:
                for chunk in answer.iter_bytes():
                    content += chunk
                    if len(content) > MAX_ANSWER_BYTES or time.monotonic() > until_s:
                        raise Unavailable(
                            "server_unreachable",
                            f"{self.address}{path} does not end its answer within {within_s:g} seconds and "
                            f"{MAX_ANSWER_BYTES:,} bytes.",
                            subject=self.address,
                        )
                return httpx2.Response(answer.status_code, content=bytes(content))
        except httpx2.RequestError as error:
            raise Unavailable(
                "server_unreachable", f"{self.address} does not answer: {error}.", subject=self.address
            ) from error

    def document(self, path: str) -> Any:
        """The JSON of a GET."""
        answer = self.request("GET", path)
        if answer.status_code != 200:
            raise self.refused(f"GET {path}", answer)
        try:
            return answer.json()
        except (ValueError, RecursionError) as error:
            raise Unavailable(
                "server_unreachable", f"{self.address}{path} is not JSON.", subject=self.address
            ) from error

    def refused(self, what: str, answer: httpx2.Response) -> RegistryError:
        """The error for an answer that is not a success."""
        text = f"{self.address} answered {what} with {answer.status_code}: {answer.text[:_MAX_TEXT]}"
        if answer.status_code >= 500:
            return Unavailable("server_unreachable", text, subject=self.address)
        return Refused("server_refused", text, subject=self.address)
