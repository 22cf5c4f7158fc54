"""Where the units of a step run: in a child of this process, or on the nodes of a Ray cluster.

The rows stay the ledger: a worker that holds a job maps its units, and what a unit finished is in shared storage. So
whatever dies, the next worker finds what is done and maps the rest.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from registry.worker.engine.units import Count, Result, Task, Unit

MAX_DEATHS = 3
"""After how many deaths of its process a unit is given up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a unit needs while it runs: `device_bytes` of one device's memory, 0 for none, and `memory_bytes` of the
    host's. `base` is the digest of a base that only some nodes have, in a directory; None if every node can get it."""

    cpus: float = 1.0
    memory_bytes: int = 0
    device_bytes: int = 0
    base: str | None = None

    def cover(self, other: "Needs") -> bool:
        """Whether a process started for these needs can serve the others too. One that reserves more of a device than
        they ask for cannot: it would keep other processes off it."""
        enough = self.cpus >= other.cpus and self.memory_bytes >= other.memory_bytes
        return enough and other.device_bytes in (0, self.device_bytes) and other.base in (None, self.base)


class Engine(Protocol):
    """Runs units."""

    @property
    def slice_examples(self) -> int:
        """The most examples of a suite that one unit measures: few where units run side by side."""
        ...

    @property
    def redone(self) -> int:
        """How many units were begun again after their process died, since `release`."""
        ...

    def prepare(self) -> None:
        """At the beginning of a job: starts what takes a while, and returns at once."""
        ...

    def map(self, task: Task, units: Sequence[Unit], needs: Needs, check: Count) -> Iterator[tuple[Unit, Result]]:
        """Yields each unit with its result, as they end. What was finished before, by any process, is not run again.
        Once this raises or is closed, no unit runs any more. `check` is called often, by the local engine also with
        what the units have just done.

        Raises what `check` raises, the error of a unit that failed (with `log_lines`, the last of its process), and
        Unavailable with `unit_lost` for a unit whose process died again and again, or `engine_unavailable`.
        """
        ...

    def release(self) -> None:
        """Lets go of what a job's next map would reuse, such as processes with loaded models."""
        ...

    def close(self) -> None:
        """Lets go of everything. No map may be running."""
        ...
