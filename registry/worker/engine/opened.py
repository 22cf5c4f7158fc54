"""The engine of a worker, chosen by its settings."""

from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from functools import cached_property
from typing import Any

from registry.environment.settings import Settings
from registry.errors import Unavailable
from registry.storage.blobs import BlobStore
from registry.worker.engine.local import LocalEngine
from registry.worker.engine.protocol import Engine, Needs
from registry.worker.engine.units import Count, HostNode, ResultT, Task, Unit, open_node

KEPT = timedelta(days=7)
"""How long the results of units are kept: a job that is retried later resumes from them."""


class WorkerEngine:
    """A worker's engine: opened when a step first needs it, and reopened after its cluster was lost."""

    def __init__(self, settings: Settings, store: BlobStore) -> None:
        self._settings, self._store = settings, store
        self._opened: Engine | None = None

    @cached_property
    def node(self) -> HostNode:
        """The node that units on this host use."""
        return open_node(self._settings, self._store)

    def sweep(self, now: datetime) -> int:
        """Removes results older than KEPT. Returns their number."""
        return self.node.results.sweep(now - KEPT)

    def forget(self, task: Task[Any], units: Sequence[Unit]) -> None:
        """Removes the kept results of units that turned out to be wrong."""
        for unit in units:
            self.node.results.delete(task.key(unit))

    def prepare(self) -> None:
        """Prepares the local engine for a job. A cluster is connected when a step first needs it."""
        if self._settings.engine.kind == "local":
            self._engine.prepare()

    @property
    def slice_examples(self) -> int:
        return self._engine.slice_examples

    @property
    def _engine(self) -> Engine:
        if self._opened is None:
            self._opened = open_engine(self._settings, self.node)
        return self._opened

    @property
    def redone(self) -> int:
        """The number of units of this job that were started again."""
        return self._opened.redone if self._opened is not None else 0

    def map(
        self, task: Task[ResultT], units: Sequence[Unit], needs: Needs, check: Count
    ) -> Iterator[tuple[Unit, ResultT]]:
        try:
            yield from self._engine.map(task, units, needs, check)
        except Unavailable as error:
            if error.code == "engine_unavailable":
                self.close()
            raise

    def release(self) -> None:
        """Releases what the job used, at its end."""
        if self._opened is not None:
            self._opened.release()

    def close(self) -> None:
        """Closes the engine, when the worker ends or after the cluster was lost."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None


def open_engine(settings: Settings, node: HostNode) -> Engine:
    """Opens the engine that the settings name. Raises Unavailable or NotAllowed if its cluster cannot be used."""
    if settings.engine.kind == "local":
        return LocalEngine(node)
    from registry.worker.engine.ray import RayEngine  # Ray is loaded where it is used

    return RayEngine(settings.engine, node)
