"""The engine in this process: the default."""

from collections.abc import Iterator, Sequence

from registry.worker.engine.protocol import Check, Needs
from registry.worker.engine.units import Node, Result, Task, Unit, finished, run_unit


class LocalEngine:
    """Runs one unit after the other in this process."""

    spreads = False

    def __init__(self, node: Node) -> None:
        self._node = node

    def map(self, task: Task, units: Sequence[Unit], needs: Needs, check: Check) -> Iterator[tuple[Unit, Result]]:
        del needs  # this host has what it has
        for unit in units:
            check()
            done = finished(self._node, task, unit)
            yield unit, run_unit(self._node, task, unit) if done is None else done

    def release(self) -> None:
        """Keeps nothing."""

    def close(self) -> None:
        """Holds nothing."""
