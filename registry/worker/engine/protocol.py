"""Where the units of a step run: in a child of this process, or on the nodes of a Ray cluster.

Database rows remain the ledger: the worker that holds a job maps its units, and finished results are in shared storage.
So whatever dies, the next worker reads the finished results and maps the rest.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from registry.worker.engine.units import Count, ResultT, Task, Unit

MAX_DEATHS = 3
"""The number of process deaths after which a unit is abandoned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """The resources of a running unit: `device_bytes` of one device's memory (0 for none) and `memory_bytes` of the
    host's. `base` is the digest of a base that only some nodes have, in a directory; None if every node can get it."""

    cpus: float = 1.0
    memory_bytes: int = 0
    device_bytes: int = 0
    base: str | None = None

    def cover(self, other: "Needs") -> bool:
        """Whether a process started for these needs can also serve the others. One that reserves more of a device than
        they require cannot, since it would keep other processes off the device."""
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
        """The number of units that were started again since `release`, after their process died."""
        ...

    def prepare(self) -> None:
        """Begins slow preparations for a job, and returns at once."""
        ...

    def map(
        self, task: Task[ResultT], units: Sequence[Unit], needs: Needs, check: Count
    ) -> Iterator[tuple[Unit, ResultT]]:
        """Yields each unit with its result as it ends. Units that any process finished before are not run again. Once
        this raises or is closed, no unit is running. `check` is called often; the local engine also passes it the
        amount that the units have just done.

        Raises what `check` raises, the error of a unit that failed (with the last `log_lines` of its process), and
        Unavailable with `unit_lost` for a unit whose process died again and again, or `engine_unavailable`.
        """
        ...

    def release(self) -> None:
        """Releases what the job's next map would reuse, such as processes with loaded models."""
        ...

    def close(self) -> None:
        """Releases everything. No map may be running."""
        ...
