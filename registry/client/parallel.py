"""Several transfers at a time, and patience between attempts."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
Progress = Callable[[int], None]

PARALLEL = 8
PAUSES_S = (0.5, 1.0, 2.0, 4.0)
"""Between attempts that came no further; after the last one the failure is told."""


def each(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Calls `function` in threads. After a failure those that run may end, no other begins, and it is raised."""
    with ThreadPoolExecutor(PARALLEL, "transfer") as pool:
        jobs = [pool.submit(function, item) for item in items]
        try:
            return [job.result() for job in jobs]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
