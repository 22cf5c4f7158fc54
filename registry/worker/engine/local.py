"""The default engine, on this host: each job has one child process, which runs its units one by one."""

import operator
import queue
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from composer.evaluation.memory import host_bytes
from registry.environment.settings import EngineSettings
from registry.errors import Unavailable
from registry.worker.engine.answers import UnitAnswer
from registry.worker.engine.child import SETTINGS, descendants
from registry.worker.engine.frames import FrameSocket
from registry.worker.engine.protocol import MAX_DEATHS, Needs
from registry.worker.engine.serving import JobFiles
from registry.worker.engine.template import Template
from registry.worker.engine.units import Count, HostNode, ResultT, Task, Unit, finished, keep_result

# The limits of a job: the time and memory of the processes that run its units.
_SECONDS, _BYTES = "ADAPTORY_ENGINE__JOB_SECONDS", "ADAPTORY_ENGINE__JOB_MEMORY_BYTES"
_WATCH_S = 0.5
_USUAL_SHARE = 0.9
"""The default limit, as a share of the memory of the host or its container."""


class JobLimits:
    """The limits of one running job. `refuse` measures memory at most every half second."""

    def __init__(self, settings: EngineSettings) -> None:
        self._seconds, self._bytes = settings.job_seconds, settings.job_memory_bytes or int(host_bytes() * _USUAL_SHARE)
        self._began_s = self._watched_s = time.monotonic()

    def refuse(self, pid: int) -> None:
        """Raises Unavailable once the job exceeds its time limit, or this process and its descendants exceed the memory
        limit."""
        now_s = time.monotonic()
        if now_s - self._began_s > self._seconds:
            raise Unavailable(
                "job_time_limit",
                f"The job took longer than {self._seconds:,.10g} seconds, the limit that {_SECONDS} sets.",
                subject=_SECONDS,
            )
        if now_s - self._watched_s < _WATCH_S:
            return
        self._watched_s = now_s
        if anonymous_bytes((pid, *descendants(pid))) > self._bytes:
            raise Unavailable(
                "job_memory_limit",
                f"The job used more than {self._bytes:,} bytes of memory, the limit that {_BYTES} sets.",
                subject=_BYTES,
            )


def anonymous_bytes(pids: Iterable[int]) -> int:
    """Sums the memory of processes that no file backs. The kernel can drop mapped files, but not this."""
    total = 0
    for pid in pids:
        with suppress(OSError):  # it has ended
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith(("RssAnon:", "RssShmem:")):
                    total += int(line.split()[1]) * 1024
    return total


_POLL_S = 0.1


class LocalEngine:
    """Runs units one by one, in a process without this one's secrets. Not thread-safe."""

    slice_examples = sys.maxsize

    def __init__(self, node: HostNode) -> None:
        self._node = node
        self._template: Template | None = None
        self._child: _JobChild | None = None
        self._limits: JobLimits | None = None
        self.redone = 0

    def prepare(self) -> None:
        self._limits = JobLimits(self._node.settings.engine)
        if self._template is None:
            self._template = Template()

    def map(
        self, task: Task[ResultT], units: Sequence[Unit], needs: Needs, check: Count
    ) -> Iterator[tuple[Unit, ResultT]]:
        del needs  # this host was chosen for the job
        for unit in units:
            check(0)
            done = finished(self._node, task, unit)
            yield unit, self._run(task, unit, check) if done is None else done

    def release(self) -> None:
        self._end_child()
        self._limits, self.redone = None, 0
        self._node.forget()

    def close(self) -> None:
        self._end_child()
        self._end_template()

    def _run(self, task: Task[ResultT], unit: Unit, check: Count) -> ResultT:
        """Runs the unit and keeps its result. Starts again in another child if one dies."""
        lost = ""
        for deaths in range(1, MAX_DEATHS + 1):
            try:
                child = self._running(check)
                answer = child.answer(task, unit, check)
            except _ChildDied:
                how = self._end_child()
                check(0)  # the signal may have been sent to every process of this service
                self.redone += 1
                lost = f"The process of {unit.name} died {deaths} times; the last time, {how}."
            except BaseException:
                self._end_child()
                raise
            else:
                return child.kept(task, unit, answer)
        raise Unavailable("unit_lost", lost, subject=unit.name)

    def _running(self, check: Count) -> "_JobChild":
        if self._child is None:
            if self._template is None or self._template.ended:
                self._end_template()
                self._template = Template()
            self._limits = self._limits or JobLimits(self._node.settings.engine)
            self._child = _JobChild(self._node, self._template, self._limits)
        self._child.start(check)
        return self._child

    def _end_child(self) -> str:
        child, self._child = self._child, None
        return child.close() if child is not None else ""

    def _end_template(self) -> None:
        template, self._template = self._template, None
        if template is not None:
            template.close()


class _ChildDied(Exception):
    """The child ended without an answer, or sent a malformed one."""


class _JobChild:
    """The child of one job."""

    def __init__(self, node: HostNode, template: Template, limits: JobLimits) -> None:
        self._node, self._template, self._limits = node, template, limits
        self._files, self._directory = JobFiles(node), node.own_directory()
        self._wire, self._end = FrameSocket.pair()
        self._received: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._pid = 0

    def start(self, check: Count) -> None:
        """Forks the process, once. Raises what `check` raises."""
        if self._pid:
            return
        settings = self._node.settings.model_dump(mode="json", include=set(SETTINGS))
        try:
            self._pid = self._template.fork(self._end, self._directory, settings, check)
        except EOFError as error:
            raise _ChildDied from error
        self._end.close()
        threading.Thread(target=self._receive, daemon=True, name="job child").start()

    def answer(self, task: Task[Any], unit: Unit, check: Count) -> UnitAnswer:
        """Runs the unit in the process and returns its answer. Raises what `check` and the limits raise, and
        _ChildDied."""
        self._files.begin(unit)
        run = {"module": task.run.__module__, "function": task.run.__qualname__}
        with suppress(OSError):  # it has ended, and its closed socket shows that below
            self._wire.send({**run, "unit": asdict(unit)})
        while True:
            check(0)
            self._limits.refuse(self._pid)
            try:
                message = self._received.get(timeout=_POLL_S)
            except queue.Empty:
                continue
            if message is None:
                raise _ChildDied
            try:
                if "count" not in message:
                    return UnitAnswer(**message)
                done = operator.index(message["count"])
            except (TypeError, ValueError) as error:  # no unit sends this
                raise _ChildDied from error
            check(done)

    def kept(self, task: Task[ResultT], unit: Unit, answer: UnitAnswer) -> ResultT:
        """Keeps and returns the result of an answer. Raises the answer's error, if it has one, and NotAllowed for a
        result that names bytes of other jobs."""
        if error := answer.failure():
            raise error
        result = cast(ResultT, answer.result)
        self._files.refuse_foreign(task, unit, result)
        keep_result(self._node, task, unit, result, by=self._pid, seconds=answer.seconds)
        return result

    def close(self) -> str:
        """Kills the process, whatever it is doing. Returns how it ended."""
        how = self._template.end(self._pid) if self._pid else "it did not start"
        self._files.close()
        self._wire.close()
        self._end.close()
        shutil.rmtree(self._directory, ignore_errors=True)
        return how

    def _receive(self) -> None:
        with suppress(EOFError):
            while True:
                frame = self._wire.receive()
                if frame.file is None:
                    self._received.put(frame.message)
                else:
                    self._files.connect(frame.file)
        self._received.put(None)
