"""A stage of a merge: threads that take jobs in order, with a bounded number of them unfinished."""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType


class Stage:
    """Runs jobs in `threads` threads, at most `most` of them submitted and unfinished. Once a job or the block fails,
    no further ones are started.

    A job may submit to another stage, which must then be opened before this one, so that it ends after it.
    """

    def __init__(self, name: str, threads: int, most: int) -> None:
        self._pool = ThreadPoolExecutor(threads, name)
        self._room = threading.Semaphore(most)
        self._lock = threading.Lock()
        self._begun: deque[Future[None]] = deque()
        self._failed = False

    def __enter__(self) -> "Stage":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def submit(self, job: Callable[[], None]) -> None:
        """Submits a job once there is room. Raises what an earlier job raised."""
        self._room.acquire()
        try:
            with self._lock:
                while self._begun and self._begun[0].done():
                    self._begun[0].result()  # a failed one stays first, so that every later call raises its error
                    self._begun.popleft()
                self._begun.append(self._pool.submit(self._run, job))
        except BaseException:
            self._room.release()
            raise

    def drain(self) -> None:
        """Waits for all jobs. Raises what the first failed one raised."""
        for future in self._begun:
            future.result()

    def _run(self, job: Callable[[], None]) -> None:
        try:
            if not self._failed:
                job()
        except BaseException:
            self._failed = True
            raise
        finally:
            self._room.release()
