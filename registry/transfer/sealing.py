"""Seals the audit log, in batches of a transaction each."""

import time
from collections import deque

from registry.domain.access import audit_chain
from registry.transfer.resources import Resources

LATE_S = 600.0
"""How long after a higher id the row of a slow transaction may still appear, and be sealed by a running worker. The
next start of a worker, and each checkpoint, look at all rows."""


PAUSE_S = 0.01
"""Between batches: SQLite has one writer, and a move that waits for it looks again only now and then."""


def seal_all(resources: Resources, after: int = 0) -> int:
    """Seals all committed rows with ids above `after`. Returns the highest id."""
    while True:
        with resources.read() as session:  # the digests are computed before anything waits for this process
            previous, seals = audit_chain.next_seals(session, after)
        if not seals:
            return after
        with resources.write() as session:
            added = audit_chain.add(session, previous, seals)
        if added:
            after = seals[-1].audit_id
        time.sleep(PAUSE_S)


class Sealer:
    """Seals what was added since the last turn: to look for unsealed rows in a log of millions takes seconds."""

    def __init__(self) -> None:
        self._seen = deque[tuple[float, int]]()
        """When which id was the highest."""
        self._after = 0

    def turn(self, resources: Resources) -> None:
        """Seals the rows that were committed since."""
        highest, now = seal_all(resources, self._after), time.monotonic()
        if not self._seen or self._seen[-1][1] != highest:
            self._seen.append((now, highest))
        while self._seen and now - self._seen[0][0] > LATE_S:
            self._after = self._seen.popleft()[1]
