"""Controls the template and its children from the worker; child.py describes both."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from composer.evaluation.scorers.process import INHERITED, INHERITED_OF
from registry.worker.engine.frames import FrameSocket

_PASSED = INHERITED | {
    "CUBLAS_WORKSPACE_CONFIG", "HF_DATASETS_CACHE", "HF_DATASETS_OFFLINE", "HF_ENDPOINT", "HF_HUB_CACHE",
    "HF_HUB_DISABLE_TELEMETRY", "LD_PRELOAD", "PYTHONHASHSEED", "PYTHONWARNINGS", "REQUESTS_CA_BUNDLE",
    "TOKENIZERS_PARALLELISM", "TRANSFORMERS_VERBOSITY",
}  # fmt: skip
_PASSED_OF = (
    *INHERITED_OF, "GOMP_", "HIP_", "KMP_", "MALLOC_", "NCCL_", "NVIDIA_", "OPENBLAS_", "PYTORCH_", "ROCR_", "TORCH",
)  # fmt: skip
_PROXIES = re.compile(r"(https?|all|no)_proxy", re.IGNORECASE)
_SET = {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1", "OPENBLAS_NUM_THREADS": "1"}
"""Keeps libraries from reading a token in the home directory, and NumPy from starting threads before a fork."""
_COMMAND = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from registry.worker.engine.child import main; main(int(sys.argv[2]))"
)
_POLL_S = 0.1
_END_S = 5.0

Check = Callable[[int], None]


def environment() -> dict[str, str]:
    """The part of this process's environment that a template inherits: variables that libraries read and that hold no
    secrets. The rest may hold tokens, passwords and database addresses under any name."""
    passed = {name: text for name, text in os.environ.items() if name in _PASSED or name.startswith(_PASSED_OF)}
    proxies = {name: text for name, text in os.environ.items() if _PROXIES.fullmatch(name) and "@" not in text}
    return {**_SET, **passed, **proxies}


def launch(end: int, passed: Mapping[str, str]) -> Callable[[], object]:
    """Starts a template with that descriptor and environment. Returns a function that waits for its end."""
    process = subprocess.Popen(  # noqa: S603 - our own module
        [sys.executable, "-P", "-c", _COMMAND, json.dumps(sys.path), str(end)],
        stdin=subprocess.DEVNULL,
        stdout=2,  # a library's output must not end up in a command's document
        pass_fds=[end],
        env=dict(passed),
        start_new_session=True,
    )
    return process.wait


class Template:
    """A running template. Not thread-safe."""

    def __init__(self) -> None:
        self._wire, end = FrameSocket.pair()
        with end:
            self._wait = launch(end.fileno(), environment())
        self._ended = dict[int, int]()
        self._forks = 0
        self.ended = False

    def fork(self, end: socket.socket, directory: Path, settings: Mapping[str, Any], check: Check) -> int:
        """Forks a child that owns this socket. Returns its process id. Raises what `check` raises, and EOFError if the
        template has ended."""
        self._forks += 1
        request = {"fork": self._forks, "directory": str(directory), "settings": settings}
        try:
            self._wire.send(request, file=end.fileno())
            while (message := self._received(check)).get("fork") != self._forks:
                self._note(message)
        except (EOFError, OSError) as error:
            self.ended = True
            raise EOFError from error
        return message["pid"]

    def end(self, pid: int) -> str:
        """Kills a child if it still runs, and waits for its end. Returns how it ended."""
        deadline_s = time.monotonic() + _END_S

        def late(_done: int) -> None:
            if time.monotonic() > deadline_s:
                raise EOFError

        try:
            self._wire.send({"end": pid})
            while pid not in self._ended:
                self._note(self._received(late))
        except (EOFError, OSError):
            self.ended = True
            return "its template has ended"
        return _how(self._ended.pop(pid))

    def close(self) -> None:
        """Ends the template and its children."""
        self._wire.close()
        self._wait()

    def _received(self, check: Check) -> dict[str, Any]:
        while not self._wire.is_ready(_POLL_S):
            check(0)
        return self._wire.receive().message

    def _note(self, message: Mapping[str, Any]) -> None:
        if "ended" in message:  # otherwise a fork that nobody waits for any more
            self._ended[message["ended"]] = message["status"]


def _how(status: int) -> str:
    """Describes a wait status in words."""
    if os.WIFSIGNALED(status):
        return f"it was ended by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"it ended with status {os.waitstatus_to_exitcode(status)}"
