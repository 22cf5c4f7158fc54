"""The engine in this process: the default."""

import sys
from collections.abc import Iterator, Sequence

from registry.worker.engine.protocol import Needs
from registry.worker.engine.units import Count, Node, Result, Task, Unit, finished, run_unit


class LocalEngine:
    """Runs one unit after the other in this process."""

    slice_examples = sys.maxsize
    redone = 0

    def __init__(self, node: Node) -> None:
        self._node = node

    def map(self, task: Task, units: Sequence[Unit], needs: Needs, check: Count) -> Iterator[tuple[Unit, Result]]:
        del needs  # units run here
        for unit in units:
            check(0)
            done = finished(self._node, task, unit)
            yield unit, run_unit(self._node, task, unit, check) if done is None else done

    def release(self) -> None:
        self._node.forget()

    def close(self) -> None:
        """There is nothing to close."""
