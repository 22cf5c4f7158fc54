"""Several transfers at a time, and patience between attempts."""

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
"""Between attempts that came no further; after the last one the failure is told."""


def map_in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Calls `function` in threads. After a failure those that run may end, no other begins, and it is raised."""
    with ThreadPoolExecutor(PARALLEL, "transfer") as pool:
        jobs = [pool.submit(function, item) for item in items]
        try:
            return [job.result() for job in jobs]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def with_retries(ask: Callable[[], Result], pauses: Iterator[float]) -> Result:
    """The answer to what may be asked twice: after a pause again, while the registry or its store is away. Raises what
    went wrong last when there are no more pauses."""
    while True:
        try:
            return ask()
        except Unavailable:
            pause = next(pauses, None)
            if pause is None:
                raise
            time.sleep(pause)


def send_once(ask: Callable[[dict[str, str]], Result], look: str) -> tuple[Result, bool]:
    """The answer to a request that must not be done twice, and whether one before was lost.

    `ask` gets headers with a key, by which the registry knows the request again. Raises what went wrong last, and where
    it may have been done all the same `answer_lost`, with `look` as the command that tells.
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
        return with_retries(attempt, iter(PAUSES_S)), lost
    except Unavailable as error:
        if not lost:
            raise
        raise Unavailable(
            "answer_lost",
            f"No answer tells whether it was done. {error.detail}",
            subject=error.subject,
            next_step=f"Look with `{look}`, and do the same again if it was not.",
        ) from error
