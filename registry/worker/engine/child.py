"""The processes that run a worker's units: a template with everything imported, and a child of it for each job.

A worker starts the template with `python -c`, in an environment without its secrets. The template inherits one end of a
socket pair; its other descriptors are an empty stdin, and stdout and stderr, which are both the worker's stderr. It
imports torch and the composer, then only waits: it computes nothing, starts no thread and leaves CUDA alone, so that it
can fork.

- For each job, the worker sends one end of another socket pair, and the template forks a child. The child reads units
  from that socket, runs them one by one, and sends back counts and answers. It has no database and no store; it
  requests bytes from the worker.
- The child leads a process group and dies with the template. When the worker requests it, or ends itself, the template
  kills the child with SIGKILL, since torch may be inside one long operation, and removes the child's directory.
- What a child has started ends with it, also if it has left the child's group and parent: the kernel gives orphans to
  the child while that runs, and then to the template.
- Whatever ended a child, the template reports its exit status, so that the worker can start another.
"""

import ctypes
import gc
import importlib
import logging
import os
import select
import shutil
import signal
import socket
import tempfile
import threading
import time
import traceback
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from registry.environment.settings import Settings
from registry.worker.engine import answers
from registry.worker.engine.answers import answer_of
from registry.worker.engine.frames import Frame, FrameSocket
from registry.worker.engine.remote import Calls, RemoteBases, RemoteDocuments, RemoteStore
from registry.worker.engine.units import Node, Unit

SETTINGS = frozenset({"home", "scorers", "scorer_timeout_s", "harness_path", "device_memory_bytes"})
"""The settings that units need. None is a secret."""
_IMPORTED = (
    "composer.conflicts.examine", "composer.evaluation.model", "composer.export.combine", "composer.merge.stream",
    "composer.optimize.combiner", "registry.worker.steps", "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
)  # fmt: skip
_IMPORTED_LATER = ("transformers.generation.utils", "transformers.modeling_utils")
"""Imported after the first job: 2.6 s, which each job that measures a model would spend, and which a command that runs
one job need not wait for."""
_WATCH_S = 1.0
"""How often the template checks that its worker lives: another process may have inherited the worker's socket."""
_COUNT_S = 0.1
_DIE_WITH_PARENT, _ADOPT_ORPHANS = 1, 36  # PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER
_FIRST_TO_DIE = "500"
"""The child's oom_score_adj: if memory runs out, the child ends before its worker."""


@dataclass(frozen=True, slots=True)
class _Child:
    """A child of the template: its process id, its pidfd (`watched`) and its directory."""

    pid: int
    watched: int
    directory: Path


def main(end: int) -> None:
    """Runs the template. `end` is the descriptor of its end of a socket pair."""
    worker, children = os.getppid(), dict[int, _Child]()
    _prctl(_ADOPT_ORPHANS, 1)
    wire = FrameSocket(socket.socket(fileno=end))
    for number in (signal.SIGINT, signal.SIGTERM):  # these reach all processes of a terminal: the worker decides
        signal.signal(number, signal.SIG_IGN)
    _import(_IMPORTED)
    try:
        while os.getppid() == worker:
            for ready in _ready(wire, children):
                if ready == wire.fileno():
                    _obey(wire, wire.receive(), children)
                else:
                    child = next(child for child in children.values() if child.watched == ready)
                    del children[child.pid]
                    status = _end(child)
                    _end_orphans(children)
                    wire.send({"ended": child.pid, "status": status})
                    _import(_IMPORTED_LATER)
    except (EOFError, OSError):  # the worker has ended
        pass
    finally:
        for child in children.values():
            _end(child)
        _end_orphans(())


def _ready(wire: FrameSocket, children: Mapping[int, _Child]) -> list[int]:
    waiting = select.poll()
    for watched in (wire.fileno(), *(child.watched for child in children.values())):
        waiting.register(watched, select.POLLIN)
    return [ready for ready, _ in waiting.poll(_WATCH_S * 1000)]


def _obey(wire: FrameSocket, frame: Frame, children: dict[int, _Child]) -> None:
    """Forks a child with the frame's socket, or kills one."""
    if "end" not in frame.message:
        _fork(wire, children, frame.owned_file(), **frame.message)
    elif child := children.get(frame.message["end"]):
        _kill(child)


def _fork(
    wire: FrameSocket, children: dict[int, _Child], end: int, *, fork: int, directory: str, settings: dict[str, Any]
) -> None:
    template = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            wire.detach()
            for child in children.values():
                os.close(child.watched)
            _be_child(template, end, Path(directory), settings)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(end)
    with suppress(OSError):  # the child has done so
        os.setpgid(pid, pid)
    children[pid] = _Child(pid, os.pidfd_open(pid), Path(directory))
    wire.send({"pid": pid, "fork": fork})


def _import(modules: Iterable[str]) -> None:
    """Imports modules for the children to come, which share them."""
    for name in modules:
        importlib.import_module(name)
    gc.freeze()


def _end(child: _Child) -> int:
    """Kills what is left of a child and removes its directory. Returns its wait status."""
    _kill(child)
    status = os.waitpid(child.pid, 0)[1]
    os.close(child.watched)
    shutil.rmtree(child.directory, ignore_errors=True)
    return status


def _kill(child: _Child) -> None:
    """Kills the child's group, and its descendants in other groups, such as scorers."""
    for kill, pid in ((os.killpg, child.pid), *((os.kill, descendant) for descendant in descendants(child.pid))):
        with suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)


def _end_orphans(children: Container[int]) -> None:
    """Kills what ended children have left: every other child of this process, and those that come to it then."""
    while left := [pid for pid in _children(os.getpid()) if pid not in children]:
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)


def descendants(pid: int) -> Iterator[int]:
    """Yields the running processes that this one started, and theirs in turn."""
    for child in _children(pid):
        yield child
        yield from descendants(child)


def _children(pid: int) -> Iterator[int]:
    for listing in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            yield from map(int, listing.read_text().split())


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _be_child(template: int, end: int, directory: Path, settings: Mapping[str, Any]) -> None:
    """Runs the child."""
    os.setpgid(0, 0)
    _prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    _prctl(_ADOPT_ORPHANS, 1)
    if os.getppid() != template:
        return
    Path("/proc/self/oom_score_adj").write_text(_FIRST_TO_DIE)
    os.environ["TMPDIR"] = tempfile.tempdir = str(directory)
    shown = logging.StreamHandler()
    shown.addFilter(lambda record: record.name != answers.__name__ or record.levelno > logging.WARNING)
    logging.basicConfig(handlers=[shown])  # the worker records the errors of units
    wire = FrameSocket(socket.socket(fileno=end))
    calls = Calls(wire)
    bases = RemoteBases(calls)
    node = Node(Settings(**settings), RemoteStore(calls), RemoteDocuments(calls), directory, bases)
    with suppress(EOFError, BrokenPipeError):  # the worker has closed its end
        while True:
            wire.send(_answer(node, wire, **wire.receive().message))


def _answer(node: Node, wire: FrameSocket, module: str, function: str, unit: Mapping[str, Any]) -> dict[str, Any]:
    """Runs a unit with the function of its task."""
    own, count, began_s = Unit(**unit), _Counter(wire), time.monotonic()

    def work() -> Any:
        run = getattr(importlib.import_module(module), function)
        return run(replace(node, check=count), own, count)

    answer = answer_of(own.name, work)
    count.flush()
    return answer.model_copy(update={"seconds": time.monotonic() - began_s}).model_dump()


class _Counter:
    """Reports a unit's progress to the worker, at most every _COUNT_S seconds."""

    def __init__(self, wire: FrameSocket) -> None:
        self._wire, self._done, self._sent_s = wire, 0, time.monotonic()
        self._lock = threading.Lock()

    def __call__(self, done: int) -> None:
        with self._lock:
            self._done += done
            if self._done and time.monotonic() - self._sent_s >= _COUNT_S:
                self._send()

    def flush(self) -> None:
        """Sends the remaining count."""
        with self._lock:
            if self._done:
                self._send()

    def _send(self) -> None:
        self._wire.send({"count": self._done})
        self._done, self._sent_s = 0, time.monotonic()
