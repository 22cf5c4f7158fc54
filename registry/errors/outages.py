"""Logs the outage of a service once a second, not once per request."""

import logging
import time
from dataclasses import dataclass, field
from threading import Lock

EVERY_S = 1.0


@dataclass(slots=True)
class OutageLog:
    """A logger's warnings about one service. Warnings within a second of the last line are counted in the next one."""

    log: logging.Logger
    _last: float = float("-inf")
    _left_out: int = 0
    _lock: Lock = field(default_factory=Lock)

    def warn(self, message: str, error: object) -> None:
        """Logs a warning at most every EVERY_S seconds; the next one counts those left out."""
        with self._lock:
            now = time.monotonic()
            if now - self._last < EVERY_S:
                self._left_out += 1
                return
            self._last, left_out, self._left_out = now, self._left_out, 0
        more = f" ({left_out:,} more like this since the last line)" if left_out else ""
        self.log.warning("%s: %s%s", message, error, more)
