"""llama.cpp: each version in a process of its own, since a running server cannot load another adapter."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx2
import psutil

from composer.formats.gguf import open_gguf_base
from registry.agent.directory import MirrorDirectory, write_json
from registry.agent.servers.protocol import CHECK_S, CheckResult, Endpoint, HttpServer, compared, words_of
from registry.agent.versions import ServedVersion
from registry.errors import Refused, RegistryError, Unavailable, Usage
from registry.formats.evidence import USUAL, EvidenceExample, Tolerance, decide, log_probability

START_S, END_S, CONVERT_S = 600.0, 10.0, 600.0
"""The time for a process to load the base, for one to end before it is killed, and for a conversion."""
_MAX_TEXT = 300
_TOP = 1000
"""As many tokens of a position are asked for with their log-probabilities."""
HANGS_S, HEALTH_S = 120.0, 1.0
"""After that long without an answer a process is reported, and the time for each answer."""
MAX_PORTS = 100
"""Each port is looked at in every round."""
_SCALES = (1.0,)
"""Of the only adapter of a process."""
_START = 'echo $$ > "$0" && exec "$@"'
"""The process notes its own number before it becomes the server: an agent that is killed just then loses none."""


class LlamaServer:
    """Runs `COMMAND --port FIRST-LAST` with one port and one adapter for each version. The processes do not end with
    the agent; another one goes on with those that it meets. Raises Usage for a command without what is needed, and
    InvalidFile or NotSupported for a base that cannot be read."""

    kind = "llamacpp"

    def __init__(self, command: str, directory: MirrorDirectory, limits: Tolerance = USUAL) -> None:
        self._words, self._directory, self._limits = words_of(command), directory, limits
        if any(word.startswith("--lora") for word in self._words):
            raise _unusable(command, "has --lora, which the agent adds itself")
        if "--reuse-port" in self._words:
            raise _unusable(command, "has --reuse-port, with which another server could answer for a version")
        self._model = _option(self._words, "-m", "--model")
        ports = re.fullmatch(r"([0-9]{1,5})-([0-9]{1,5})", _option(self._words, "--port"))
        if ports is None or not 0 < int(ports[1]) < int(ports[2]) < 65536:
            raise _unusable(command, "needs a range of at least two ports, such as --port 8100-8103")
        if int(ports[2]) - int(ports[1]) >= MAX_PORTS:
            raise _unusable(command, f"has more than {MAX_PORTS} ports")
        if not self._model:
            raise _unusable(command, "needs the base's GGUF file: -m FILE")
        self._range, self._ports = ports[0], range(int(ports[1]), int(ports[2]) + 1)
        host = _option(self._words, "--host") or "127.0.0.1"
        self._host = "127.0.0.1" if host in ("0.0.0.0", "::") else host  # noqa: S104 - what the operator chose
        self.address = f"http://{self._host}:{self._range}"
        self._http = {port: HttpServer(f"http://{self._host}:{port}") for port in self._ports}
        self._quantized = open_gguf_base(Path(self._model)).quantized
        self._files, self._notes = directory.root / "gguf", directory.root / "llamacpp"
        self._served: Mapping[str, tuple[int, Path]] = {}
        self._ready = set[int]()
        self._answered_s = dict[int, float]()
        self._children = dict[int, subprocess.Popen[bytes]]()

    def close(self) -> None:
        for http in self._http.values():
            http.close()

    def loaded(self) -> Mapping[str, str]:
        """The versions of the processes that run and have once answered that they are ready. One that computes a long
        prompt may not answer for a while, and still serves."""
        served, paths = dict[str, tuple[int, Path]](), dict[str, str]()
        for port in self._ports:
            running = self._running(port)
            if running is None or not self._is_ready(port, running[0]):
                continue
            file = running[1]
            name, commit = "/".join(file.parts[-4:-2]), file.parts[-2]
            served[name], paths[name] = (port, file), str(self._directory.path(commit))
        self._served = served
        self._answered_s = {port: self._last_answer_s(port) for port, _ in served.values()}
        return paths

    @property
    def problem(self) -> str:
        """The processes that have not answered for a while: they keep their routes, since they may compute."""
        now_s = time.monotonic()
        return " ".join(
            f"{self._http[port].address} ({name}) has not answered for {now_s - self._answered_s[port]:.0f} seconds. "
            "If it hangs, end its process: the agent starts another one."
            for name, (port, _) in self._served.items()
            if now_s - self._answered_s[port] > HANGS_S
        )

    def _last_answer_s(self, port: int) -> float:
        with suppress(Unavailable):
            self._http[port].request("GET", "/health", within_s=HEALTH_S)
            return time.monotonic()
        return self._answered_s.get(port, time.monotonic())

    def endpoint(self, name: str) -> Endpoint:
        return Endpoint(self._http[self._served[name][0]].address, _SCALES)

    def load(self, version: ServedVersion, directory: Path) -> None:
        file = self._converted(version, directory)
        running = {port: self._running(port) for port in self._ports}
        # One may have been started by an agent that was killed while it waited.
        port = next((port for port, other in running.items() if other and other[1] == file), None)
        if port is None:
            port = next((port for port, other in running.items() if other is None and self._is_free(port)), None)
            if port is None:
                raise Refused(
                    "server_refused",
                    f"{version.name} needs a port, and all of {self._range} are in use.",
                    subject=self._range,
                )
            self._start(port, version, file)
        until_s = time.monotonic() + START_S
        while version.name not in self.loaded():
            if self._running(port) is None:
                said = self._log(port).read_text(errors="replace").strip()[-_MAX_TEXT:] or "nothing"
                raise Refused(
                    "server_refused", f"The process of {version.name} ended. It said: {said}", subject=self._range
                )
            if time.monotonic() > until_s:
                self._end(port)
                message = f"The process of {version.name} did not answer within {START_S:g} seconds."
                raise Unavailable("server_unreachable", message, subject=self._http[port].address)
            time.sleep(0.1)

    def unload(self, name: str) -> None:
        self.loaded()
        if name in self._served:
            self._end(self._served[name][0])

    def busy(self) -> frozenset[str] | None:
        """The versions with a slot that computes, and those that do not answer: they may compute. A request waits only
        while all slots compute. None if a server was started with `--no-slots`."""
        names = set[str]()
        for name, (port, _) in self._served.items():
            try:
                answer = self._http[port].request("GET", "/slots")
            except Unavailable:
                names.add(name)
                continue
            if answer.status_code != 200:
                return None
            if any(slot.get("is_processing") for slot in _rows(answer, self._http[port].address)):
                names.add(name)
        return frozenset(names)

    def check(self, name: str, evidence: Sequence[EvidenceExample] | None = None) -> CheckResult:
        """Asks for the next token's log-probabilities at each token of the evidence, since llama.cpp has none of a
        prompt. The process has one adapter, so that its cache cannot be another's."""
        until_s = time.monotonic() + CHECK_S
        if name not in self._served:
            return CheckResult("failed", f"{name} is not loaded.")
        try:
            listed = self._adapters(name)
            if listed != [str(self._served[name][1])]:
                return CheckResult(
                    "failed", f"{self.endpoint(name).url} has the adapters {', '.join(listed) or 'none'}."
                )
            if evidence is None:
                self._next_token(name, "Hello", until_s)
                return CheckResult("unproved")
            answered = list[list[float | None]]()
            for example in evidence:
                answered.append([])
                for position in range(example.start, len(example.ids)):
                    if time.monotonic() > until_s:
                        return CheckResult("unproved", f"The check did not end within {CHECK_S:g} seconds.")
                    said = self._next_token(name, example.ids[:position], until_s)
                    # An unlisted token is at most as probable as the last one of the list, which says
                    # nothing where the release gives it less.
                    least = min(said.values())
                    unsaid = least if example.release[position - example.start] > least else None
                    answered[-1].append(said.get(example.ids[position], unsaid))
        except RegistryError as error:
            return CheckResult("failed", error.detail)
        values = [value for of_example in answered for value in of_example]
        if 2 * values.count(None) > len(values):
            return CheckResult("unproved", f"Most tokens are not among the {_TOP:,} that {self.address} lists.")
        # The base that was measured is not quantized. A limit that the operator states counts.
        loosely = self._quantized and self._limits == USUAL
        return compared(self.endpoint(name).url, name, decide(evidence, answered, self._limits), loosely=loosely)

    def _adapters(self, name: str) -> list[str]:
        """The files that a process reports as loaded."""
        http = self._http[self._served[name][0]]
        answer = http.request("GET", "/lora-adapters", within_s=CHECK_S)
        if answer.status_code != 200:
            raise http.refused("GET /lora-adapters", answer)
        return [str(row.get("path")) for row in _rows(answer, http.address)]

    def _next_token(self, name: str, prompt: str | Sequence[int], until_s: float) -> Mapping[int, float]:
        """The log-probabilities of the most probable next tokens."""
        http = self._http[self._served[name][0]]
        lora = [{"id": number, "scale": scale} for number, scale in enumerate(_SCALES)]
        body = {"prompt": prompt, "n_predict": 1, "temperature": 0, "n_probs": _TOP, "lora": lora}
        answer = http.request("POST", "/completion", body, max(1.0, until_s - time.monotonic()))
        if answer.status_code != 200:
            raise http.refused(f"a request to {name}", answer)
        try:
            rows = answer.json()["completion_probabilities"][0]["top_logprobs"]
            return {int(row["id"]): log_probability(row["logprob"]) for row in rows}
        except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
            message = f"{http.address} answers {name} without log-probabilities."
            raise Unavailable("server_unreachable", message, subject=http.address) from error

    def _is_ready(self, port: int, pid: int) -> bool:
        """Whether a process has loaded its model and adapter. It is not asked again: all its threads may be taken."""
        if pid not in self._ready:
            with suppress(Unavailable):
                if self._http[port].request("GET", "/health").status_code == 200:
                    self._ready.add(pid)
        return pid in self._ready

    def _converted(self, version: ServedVersion, directory: Path) -> Path:
        """The release as a GGUF file. Removes the files of releases that are gone from by-commit, and all for another
        base. The conversion needs torch, and gives its memory back by ending."""
        self._keep_of_this_base()
        for kept in self._files.glob("*/*/*"):
            if not self._directory.path(kept.name).is_dir():
                shutil.rmtree(kept, ignore_errors=True)
        file = self._file(version.name, version.commit)
        if file.is_file():
            return file
        words = [sys.executable, "-m", "registry.cli.start", "convert", str(directory), "--base", self._model]
        try:
            file.parent.parent.mkdir(parents=True, exist_ok=True)
            ended = subprocess.run(  # noqa: S603 - our own command
                [*words, "--to", "gguf", "-o", str(file.parent)],
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=CONVERT_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            message = f"{version.name} cannot be converted: {error}."
            raise Unavailable("server_unreachable", message, subject=version.name) from error
        if ended.returncode:
            said = ended.stderr.strip()[-_MAX_TEXT:]
            raise Refused("server_refused", f"{version.name} cannot be converted: {said}", subject=version.name)
        return file

    def _keep_of_this_base(self) -> None:
        """Removes the conversions for another base, whose rows may be in another order. Running processes have read
        theirs."""
        try:
            base, noted = Path(self._model).resolve(), self._files / "base.json"
            status = base.stat()
            of_base = {"path": str(base), "bytes": status.st_size, "changed_ns": status.st_mtime_ns}
            if noted.is_file() and json.loads(noted.read_bytes()) != of_base:
                shutil.rmtree(self._files)
            self._files.mkdir(parents=True, exist_ok=True)
            write_json(noted, of_base)
        except (OSError, ValueError) as error:
            message = f"{self._model} cannot be compared with the base of earlier conversions: {error}."
            raise Unavailable("server_unreachable", message, subject=self._model) from error

    def _start(self, port: int, version: ServedVersion, file: Path) -> None:
        words = [str(port) if word == self._range else word for word in self._words]
        words += ["--alias", version.name, "--lora", str(file)]
        environment = {name: text for name, text in os.environ.items() if not name.startswith("ADAPTORY_")}
        try:
            self._notes.mkdir(exist_ok=True)
            self._note(port).unlink(missing_ok=True)
            with self._log(port).open("wb") as log:
                self._children[port] = subprocess.Popen(  # noqa: S603 - the operator's own command
                    ["/bin/sh", "-c", _START, str(self._note(port)), *words],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=environment,
                    start_new_session=True,
                )
            until_s = time.monotonic() + END_S
            while self._children[port].poll() is None and self._running(port) is None and time.monotonic() < until_s:
                time.sleep(0.01)
        except OSError as error:
            message = f"{version.name} cannot be started: {error}."
            raise Unavailable("server_unreachable", message, subject=version.name) from error

    def _running(self, port: int) -> tuple[int, Path] | None:
        """The number and the adapter of the process that an agent of this directory started on the port. The number may
        be another's by now, also that of a process on another port or of a conversion."""
        if child := self._children.get(port):
            child.poll()  # else one that has ended stays listed
        try:
            pid = int(self._note(port).read_text())
            words = psutil.Process(pid).cmdline()
        except (OSError, ValueError, psutil.Error):
            return None
        file = Path(_option(words, "--lora"))
        is_ours = _option(words, "--port") == str(port) and self._files in file.parents
        return (pid, file) if is_ours else None

    def _end(self, port: int) -> None:
        for number, within_s in ((signal.SIGTERM, END_S), (signal.SIGKILL, END_S)):
            until_s = time.monotonic() + within_s
            while (running := self._running(port)) and time.monotonic() < until_s:
                with suppress(ProcessLookupError):
                    os.killpg(running[0], number)
                time.sleep(0.1)
        if self._running(port) is None:  # its number may become another's
            self._note(port).unlink(missing_ok=True)

    def _is_free(self, port: int) -> bool:
        with socket.socket() as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                tried.bind((self._host, port))
            except OSError:
                return False
        return True

    def _file(self, name: str, commit: str) -> Path:
        return self._files / name / commit / "adapter.gguf"

    def _note(self, port: int) -> Path:
        return self._notes / f"{port}.pid"

    def _log(self, port: int) -> Path:
        return self._notes / f"{port}.log"


def _option(words: Sequence[str], *names: str) -> str:
    """The value of an option of a command; empty without it."""
    return next((value for word, value in pairwise(words) if word in names), "")


def _rows(answer: httpx2.Response, address: str) -> Sequence[Mapping[str, Any]]:
    """The rows of an answer. Raises Unavailable for anything but a list of objects."""
    try:
        return [dict(row) for row in answer.json()]
    except (ValueError, TypeError, RecursionError) as error:
        message = f"{address} does not answer as llama.cpp does."
        raise Unavailable("server_unreachable", message, subject=address) from error


def _unusable(command: str, why: str) -> Usage:
    return Usage("bad_server", f"--server llamacpp={command} {why}.", subject=command)
