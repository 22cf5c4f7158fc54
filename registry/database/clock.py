"""The clock of a process, kept in step with that of the database."""

import time
from datetime import UTC, datetime, timedelta

from sqlalchemy.orm import Session

from registry.database.engine import database_now

COMPARED_EVERY_S = 60.0


def utc_now() -> datetime:
    """The time by this host's clock."""
    return datetime.now(UTC)


class DatabaseClock:
    """The database's time, carried on by this host's steady clock: what one server records with a time, such as the
    report of a node or the step of a canary, others compare with theirs. Thread-safe."""

    def __init__(self) -> None:
        self._compared: tuple[datetime, float] | None = None

    def __call__(self) -> datetime:
        """The time now; this host's before the first comparison."""
        if self._compared is None:
            return utc_now()
        then, steady_s = self._compared
        return then + timedelta(seconds=time.monotonic() - steady_s)

    def compare(self, session: Session) -> None:
        """Reads the database's clock, once a minute."""
        steady_s = time.monotonic()
        if self._compared is None or steady_s - self._compared[1] > COMPARED_EVERY_S:
            self._compared = database_now(session), steady_s
