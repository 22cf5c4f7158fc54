"""The limits of a job: seconds and memory of the processes that run its units."""

import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from composer.evaluation.memory import host_bytes
from registry.errors import Unavailable
from registry.settings import EngineSettings
from registry.worker.engine.child import descendants

_SECONDS, _BYTES = "ADAPTORY_ENGINE__JOB_SECONDS", "ADAPTORY_ENGINE__JOB_MEMORY_BYTES"
_WATCH_S = 0.5
_USUAL_SHARE = 0.9
"""Of the memory of the host or its container, if the setting names no other limit."""


class JobLimits:
    """What is left to a job. `refuse` looks at most every half second."""

    def __init__(self, settings: EngineSettings) -> None:
        self._seconds, self._bytes = settings.job_seconds, settings.job_memory_bytes or int(host_bytes() * _USUAL_SHARE)
        self._began_s = self._watched_s = time.monotonic()

    def refuse(self, pid: int) -> None:
        """Raises Unavailable once the job has taken longer than its limit, or this process and those that it started
        have more memory."""
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
                f"The job took more than {self._bytes:,} bytes of memory, the limit that {_BYTES} sets.",
                subject=_BYTES,
            )


def anonymous_bytes(pids: Iterable[int]) -> int:
    """The memory of processes that no file backs: mapped files can be dropped, and this cannot."""
    total = 0
    for pid in pids:
        with suppress(OSError):  # it has ended
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    total += int(line.split()[1]) * 1024
    return total
