"""A Python scorer in a process of its own, which is killed when an example takes too long.

The two exchange JSON: first the scorer's name and settings, then an answer with its example against a score. Each reply
may have `why` instead.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import TypedDict

from composer.errors import ComposerError
from composer.evaluation.scorers.scorer import (
    BUILT_IN,
    PythonScorers,
    Scorer,
    ScorerFailure,
    ScorerTimeout,
    installed_scorers,
    scorer_failed,
    scorer_named,
    settings_refused,
)
from composer.formats.recipes.suite import Example
from composer.formats.recipes.tasks import ScorerChoice

START_S = 120.0
"""For loading the scorer's code and making it from the settings, at least."""
_WATCH_S = 1.0
INHERITED = frozenset(
    (
        *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TMPDIR", "TEMP", "TMP", "SYSTEMROOT"),
        *("VIRTUAL_ENV", "LD_LIBRARY_PATH", "SSL_CERT_FILE", "SSL_CERT_DIR"),
        *("HF_HOME", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"),
    )
)
INHERITED_OF = ("SCORER_", "LC_", "CUDA_", "OMP_", "MKL_", "XDG_", "COVERAGE_")


class Reply(TypedDict, total=False):
    """What a scorer's process replies: the `score` of an answer, or `why` it has none, or its `name` and why its
    `settings` are refused."""

    score: float
    why: str
    name: str
    settings: str


@contextmanager
def open_scorer(chosen: ScorerChoice, enabled: PythonScorers) -> Generator[Scorer]:
    """The scorer of that name, a Python scorer in a process of its own. Raises as `scorer_named`, and NotSupported if
    it does not start."""
    if chosen.name in BUILT_IN:
        yield scorer_named(chosen, enabled.names)
        return
    installed_scorers(chosen.name, enabled.names)
    try:
        process = ScorerProcess(chosen, enabled.limit_s)
    except ScorerFailure as error:
        raise scorer_failed(chosen.name, "", f"it does not start: {error}") from error
    with closing(process):
        yield process


class ScorerProcess:
    """Calls a Python scorer, from one thread at a time. What it starts itself ends with it, unless that leaves the
    process group."""

    def __init__(self, chosen: ScorerChoice, limit_s: float) -> None:
        """Raises InvalidFile for settings that the scorer does not accept, and ScorerFailure if it does not start."""
        self._limit_s = limit_s
        self._lock = threading.Lock()
        self._ended: ScorerFailure | None = None
        self._connection, child = Pipe()
        command = [sys.executable, "-P", "-m", "composer.evaluation.scorers.process", str(child.fileno())]
        self._process = subprocess.Popen(  # noqa: S603, our own module
            command,
            stdin=subprocess.DEVNULL,
            stdout=2,  # output of a scorer must not end up in a document
            pass_fds=[child.fileno()],
            env=_environment(),
            start_new_session=True,
        )
        child.close()
        try:
            self._ask({"scorer": chosen.model_dump()}, max(START_S, limit_s))
        except BaseException:
            self.close()
            raise

    def __call__(self, answer: str, example: Example) -> float:
        """Raises ScorerTimeout, after which the process is gone, and ScorerFailure."""
        with self._lock:
            if self._ended:  # on the example of another thread
                raise self._ended
            try:
                reply = self._ask({"answer": answer, "example": asdict(example)}, self._limit_s)
                if "score" not in reply:
                    raise ScorerFailure("its process replied without a score")
                return reply["score"]
            except ScorerFailure as error:
                error.example = example
                self._ended = error if self._process.poll() is not None else None
                raise

    def close(self) -> None:
        """Ends the process, once."""
        if self._connection.closed:
            return
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._connection.close()

    def _ask(self, request: Mapping[str, object], limit_s: float) -> Reply:
        try:
            self._connection.send_bytes(json.dumps(request).encode())
            if not self._connection.poll(limit_s):
                self.close()
                raise ScorerTimeout(limit_s)
            reply: Reply = json.loads(self._connection.recv_bytes())
        except (EOFError, OSError) as error:
            raise ScorerFailure(f"its process ended with {self._status()}") from error
        if "settings" in reply and "name" in reply:
            raise settings_refused(reply["name"], reply["settings"])
        if "why" in reply:
            raise ScorerFailure(reply["why"])
        return reply

    def _status(self) -> int:
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(_WATCH_S)
        self.close()
        return self._process.wait()


def _environment() -> dict[str, str]:
    """The environment of a scorer's process: the variables that programs need here, and those meant for scorers. Others
    contain tokens, passwords and addresses of databases, under any name."""
    kept = {name: text for name, text in os.environ.items() if name in INHERITED or name.startswith(INHERITED_OF)}
    return kept | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def serve(connection: Connection) -> None:
    """The other side: answers until the connection closes."""
    chosen = ScorerChoice.model_validate(json.loads(connection.recv_bytes())["scorer"])
    try:
        scorer = scorer_named(chosen, (chosen.name,))
    except ComposerError as error:
        return _reply(connection, {"name": chosen.name, "settings": error.message})
    except (Exception, SystemExit) as error:
        return _reply(connection, {"why": f"{type(error).__name__}: {error}"})
    _reply(connection, {})
    while True:
        request = json.loads(connection.recv_bytes())
        example = Example(**{**request["example"], "choices": tuple(request["example"]["choices"])})
        try:
            _reply(connection, {"score": float(scorer(request["answer"], example))})
        except (Exception, SystemExit) as error:
            _reply(connection, {"why": f"{type(error).__name__}: {error}"})


def _reply(connection: Connection, reply: Reply) -> None:
    connection.send_bytes(json.dumps(reply).encode())


def _end_with(parent: int) -> None:
    """Ends this process after its parent, which a scorer that loops would outlive."""
    while os.getppid() == parent:
        time.sleep(_WATCH_S)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    with suppress(EOFError):
        serve(Connection(int(sys.argv[1])))
