"""Answers of processes that run units: a result, or an error row with the last lines of the log."""

import logging
import traceback
from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, NonNegativeFloat, model_validator

from composer.errors import ComposerError
from registry.errors import RegistryError, Unavailable
from registry.errors.translation import of_failed_work, of_row

log = logging.getLogger(__name__)

LOG_LINES = 200
KNOWN = (RegistryError, ComposerError, OSError)
"""Errors with a next step. Any other error is a defect."""


class UnitAnswer(BaseModel):
    """A unit's result, or its error as a row with the last lines of the process's log."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    log: list[str] = []
    seconds: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _refuse_both_or_neither(self) -> Self:
        if (self.result is None) == (self.error is None):
            raise ValueError("an answer has either a result or an error")
        return self

    def failure(self) -> RegistryError | None:
        """Restores the error, with its log lines."""
        if self.error is None:
            return None
        error = of_row(self.error)
        error.log_lines = self.log
        return error


def answer_of(name: str, work: Callable[[], Any]) -> UnitAnswer:
    """Runs a unit's work."""
    with _last_log_lines() as lines:
        try:
            log.info("%s begins", name)
            return UnitAnswer(result=work())
        except Exception as error:
            known = isinstance(error, KNOWN)
            log.log(logging.WARNING if known else logging.ERROR, "%s failed", name, exc_info=error)
            return UnitAnswer(error=failure_of(error).to_row(), log=list(lines))


def failure_of(error: Exception) -> RegistryError:
    """Converts an error to the one that a worker reports. A defect becomes Unavailable with `unit_failed`."""
    if isinstance(error, KNOWN):
        return of_failed_work(error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{last.filename.rpartition('/')[2]}:{last.lineno}"
    return Unavailable("unit_failed", f"{type(error).__name__} in {where}: {error}")


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
