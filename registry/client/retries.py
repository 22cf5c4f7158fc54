"""Parallel transfers and retries."""

import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from registry.client.api import answer_lost
from registry.errors import Unavailable

Item = TypeVar("Item")
Result = TypeVar("Result")
Progress = Callable[[int], None]

PARALLEL = 8
PAUSES_S = (0.5, 1.0, 2.0, 4.0)
"""Pauses between attempts without progress; after the last one, the failure is raised."""


def pauses() -> Iterator[float]:
    """All of them, for a request that has not failed yet or has made progress."""
    return iter(PAUSES_S)


def map_in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Calls `function` on each item in threads. After a failure, running calls may finish, no other starts, and the
    failure is raised."""
    with ThreadPoolExecutor(PARALLEL, "transfer") as pool:
        jobs = [pool.submit(function, item) for item in items]
        try:
            return [job.result() for job in jobs]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def with_retries(ask: Callable[[], Result], left: Iterator[float]) -> Result:
    """Retries an idempotent request, after the pauses that are left, while the registry or its store is unavailable.
    Raises the last error when there are none."""
    while True:
        try:
            return ask()
        except Unavailable:
            pause = next(left, None)
            if pause is None:
                raise
            time.sleep(pause)


def send_once(ask: Callable[[dict[str, str]], Result], look: str) -> tuple[Result, bool]:
    """Sends a request that must take effect once. Returns the answer, and whether an earlier one was lost.

    `ask` gets headers with an idempotency key. Raises the last error, or `answer_lost` if the request may have taken
    effect, with `look` as the command to check.
    """
    headers = {"Idempotency-Key": str(uuid.uuid4())}
    lost = False

    def attempt() -> Result:
        nonlocal lost
        try:
            return ask(headers)
        except Unavailable as error:
            lost = lost or answer_lost(error)
            raise

    try:
        return with_retries(attempt, pauses()), lost
    except Unavailable as error:
        if not lost:
            raise
        raise Unavailable(
            "answer_lost",
            f"The answer was lost: the request may have taken effect. {error.detail}",
            subject=error.subject,
            next_step=f"Check with `{look}`, and repeat the command if the request had no effect.",
        ) from error
