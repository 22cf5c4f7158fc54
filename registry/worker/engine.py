"""Where the units of a step run: in this process, or on the nodes of a Ray cluster.

The rows stay the ledger: a worker that holds a job maps its units, and what a unit finished is in shared storage. So
whatever dies, the next worker finds what is done and maps the rest.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from registry.errors import Unavailable
from registry.settings import Settings
from registry.worker.units import Node, Result, Task, Unit, finished, open_node, run_unit

Check = Callable[[], None]
"""Called now and then; raises when the work is to stop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What one unit needs at a time. `device_bytes` of one device's memory, 0 for none; `memory_bytes` of the host's.
    `base` is the digest of one that only some nodes have, in a directory; None if every node can get it."""

    cpus: float = 1.0
    memory_bytes: int = 0
    device_bytes: int = 0
    base: str | None = None


class Engine(Protocol):
    """Runs units."""

    @property
    def spreads(self) -> bool:
        """Whether units run beside each other, on other hosts than this."""
        ...

    def map(
        self, task: Task, units: Sequence[Unit], needs: Needs, check: Check
    ) -> Iterator[tuple[Unit, Result]]:
        """Yields each unit with its result, as they end. What was finished before, by any process, comes first and is
        not run again. Once this raises or is closed, no unit runs any more.

        Raises what `check` raises, the error of a unit that failed (with `log_lines`, the last of its process), and
        Unavailable with `unit_lost` for a unit whose process died again and again, or `engine_unavailable`.
        """
        ...

    def close(self) -> None:
        """Gives back what the engine holds. No map may be running."""
        ...


class LocalEngine:
    """Runs one unit after the other in this process."""

    spreads = False

    def __init__(self, node: Node) -> None:
        self._node = node

    def map(
        self, task: Task, units: Sequence[Unit], needs: Needs, check: Check
    ) -> Iterator[tuple[Unit, Result]]:
        del needs  # this host has what it has
        for unit in units:
            check()
            done = finished(self._node, task, unit)
            yield unit, run_unit(self._node, task, unit) if done is None else done

    def close(self) -> None:
        """Holds nothing."""


class WorkerEngine:
    """A worker's engine: opened when a step first needs it, and again after it was lost."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._opened: Engine | None = None

    @property
    def spreads(self) -> bool:
        """Whether the settings name a cluster."""
        return self._settings.engine.kind != "local"

    def map(self, task: Task, units: Sequence[Unit], needs: Needs, check: Check) -> Iterator[tuple[Unit, Result]]:
        if self._opened is None:
            self._opened = open_engine(self._settings)
        try:
            yield from self._opened.map(task, units, needs, check)
        except Unavailable as error:
            if error.code == "engine_unavailable":
                self.close()
            raise

    def close(self) -> None:
        if self._opened is not None:
            self._opened.close()
            self._opened = None


def open_engine(settings: Settings) -> Engine:
    """The engine that the settings name. Raises Unavailable or NotAllowed if its cluster cannot be used."""
    node = open_node(settings)
    if settings.engine.kind == "local":
        return LocalEngine(node)
    from registry.worker.ray_engine import RayEngine  # Ray is loaded where it is used

    return RayEngine(settings.engine, node)
