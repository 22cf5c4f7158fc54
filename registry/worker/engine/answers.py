"""Answers of processes that run units: a result, or an error row with the last lines of the log."""

import logging
import traceback
from collections import deque
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

from composer.errors import ComposerError
from registry.errors import RegistryError, Unavailable
from registry.errors.translation import of_failed_work, of_row
from registry.worker.engine.units import Result

log = logging.getLogger(__name__)

LOG_LINES = 200
KNOWN = (RegistryError, ComposerError, OSError)
"""Errors with a next step. Any other error is a defect."""


def answer_of(name: str, work: Callable[[], Result]) -> dict[str, Any]:
    """Runs a unit's work. Returns its `result`, or its `error` as a row with the last lines of this process's `log`."""
    with _last_log_lines() as lines:
        try:
            log.info("%s begins", name)
            return {"result": work()}
        except Exception as error:
            known = isinstance(error, KNOWN)
            log.log(logging.WARNING if known else logging.ERROR, "%s failed", name, exc_info=error)
            return {"error": failure_of(error).to_row(), "log": list(lines)}


def failure_of(error: Exception) -> RegistryError:
    """Converts an error to the one that a worker reports. A defect becomes Unavailable with `unit_failed`."""
    if isinstance(error, KNOWN):
        return of_failed_work(error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{last.filename.rpartition('/')[2]}:{last.lineno}"
    return Unavailable("unit_failed", f"{type(error).__name__} in {where}: {error}")


def error_of(answer: Mapping[str, Any]) -> RegistryError:
    """Restores the error of an answer, with its log lines."""
    error = of_row(answer["error"])
    error.log_lines = list(answer["log"])
    return error


@contextmanager
def _last_log_lines() -> Generator[deque[str]]:
    """Collects the last LOG_LINES lines that this process logs inside the block."""
    lines: deque[str] = deque(maxlen=LOG_LINES)
    handler = _AnswerCollector(lines)
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield lines
    finally:
        root.removeHandler(handler)


class _AnswerCollector(logging.Handler):
    def __init__(self, lines: deque[str]) -> None:
        super().__init__(logging.INFO)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.extend(self.format(record).splitlines())
