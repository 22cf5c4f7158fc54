"""A worker's host: what it offers to jobs (bases, the harness, scorers, packages, device memory), and the working
directories of compositions on it."""

import importlib.util
import shutil
from collections.abc import Iterable
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

from sqlalchemy import select

from registry.database.tables import Composition, Job
from registry.domain.jobs import needs
from registry.domain.jobs.needs import EVOLUTION, HARNESS, Offer, WantedNeeds
from registry.domain.jobs.queue import FINISHED
from registry.storage.hub.bases import may_find_base
from registry.transfer.bases import in_buckets
from registry.transfer.resources import Resources


class Host:
    """This worker's host. Each offer inspects it anew, since directories come and go."""

    def __init__(self, resources: Resources, kinds: Iterable[str]) -> None:
        self._resources, self._kinds = resources, frozenset(kinds)

    def offer(self) -> Offer:
        """Returns the needs of unfinished jobs that this host meets now."""
        with self._resources.read() as session:
            wanted = needs.wanted(session)
        names = frozenset(need for need in wanted.names if self._meets(need, wanted))
        return Offer(kinds=self._kinds, names=names, memory_bytes=self._memory_bytes() if wanted.memory else 0)

    def _memory_bytes(self) -> int:
        settings = self._resources.settings
        if settings.device_memory_bytes is None and settings.engine.kind == "ray":
            return _ANY_BYTES
        return settings.device_memory_bytes or _measured_bytes()

    def _meets(self, need: str, wanted: WantedNeeds) -> bool:
        if (digest := needs.base_of(need)) is not None:
            locations = wanted.bases[digest][0]
            return may_find_base(locations) or bool(in_buckets(locations))
        if (scorer := needs.scorer_of(need)) is not None:
            return scorer in self._resources.settings.enabled_scorers.names and scorer in _installed_scorers()
        package = {HARNESS: "lm_eval", EVOLUTION: "cmaes"}.get(need)  # None for a need that only a newer version knows
        return package is not None and importlib.util.find_spec(package) is not None


_ANY_BYTES = 1 << 62
"""The nodes of a cluster load the models, and its engine refuses a model that fits on none of them."""


@cache
def _measured_bytes() -> int:
    from composer.evaluation.memory import device_bytes

    return device_bytes()


@cache
def _installed_scorers() -> frozenset[str]:
    from composer.evaluation.scorers.scorer import GROUP

    return frozenset(entry_points(group=GROUP).names)


_WORK = "composition-"


def work_of(resources: Resources, composition_id: int) -> Path:
    """The directory on this host for the results of a composition's steps."""
    return resources.work_directory / f"{_WORK}{composition_id}"


def sweep_work(resources: Resources) -> int:
    """Removes the directories of ended compositions and returns their number. A worker on another host may have ended a
    composition that began here, but cleaned only its own disk."""
    names = (path.name.removeprefix(_WORK) for path in resources.work_directory.glob(f"{_WORK}*"))
    there = {int(name) for name in names if name.isdecimal()}
    if not there:
        return 0
    with resources.read() as session:
        going_on = select(Composition.id).join(Job, Job.id == Composition.job_id).where(Job.state.not_in(FINISHED))
        ended = there - set(session.scalars(going_on.where(Composition.id.in_(there))))
    for composition_id in ended:
        shutil.rmtree(work_of(resources, composition_id), ignore_errors=True)
    return len(ended)
