"""Limits the audit rows for refusals of unauthenticated callers, who can cause any number of them."""

import time
from collections import deque
from dataclasses import dataclass, field
from threading import Lock

MAX_REFUSALS = 60
"""Audit rows per minute, of one kind and in one process."""
_MINUTE_S = 60


@dataclass(slots=True)
class RefusalBudget:
    """The rows written in the last minute."""

    _recorded: deque[float] = field(default_factory=deque[float])
    _lock: Lock = field(default_factory=Lock)

    def spend(self) -> bool:
        """Whether one more row may be written; counts it if so."""
        now = time.monotonic()
        with self._lock:
            while self._recorded and now - self._recorded[0] >= _MINUTE_S:
                self._recorded.popleft()
            if len(self._recorded) >= MAX_REFUSALS:
                return False
            self._recorded.append(now)
            return True
