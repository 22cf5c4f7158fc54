"""The limits of a job: the time and memory of the processes that run its units."""

import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from composer.evaluation.memory import host_bytes
from registry.environment.settings import EngineSettings
from registry.errors import Unavailable
from registry.worker.engine.child import descendants

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
                if line.startswith("RssAnon:"):
                    total += int(line.split()[1]) * 1024
    return total
