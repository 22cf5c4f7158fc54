"""Waits for effects of other threads or processes."""

import time
from collections.abc import Callable
from typing import TypeVar

Seen = TypeVar("Seen")


def eventually(look: Callable[[], Seen], *, within_s: float = 60, every_s: float = 0.05) -> Seen:
    """The first true value that `look` returns. Fails after `within_s` seconds."""
    deadline = time.monotonic() + within_s
    while not (seen := look()):
        assert time.monotonic() < deadline
        time.sleep(every_s)
    return seen
