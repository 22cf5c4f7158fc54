"""What a worker offers to jobs: bases, the harness, scorers, packages and device memory."""

import importlib.util
from collections.abc import Iterable
from functools import cache
from importlib.metadata import entry_points

from registry.domain.jobs import needs
from registry.domain.jobs.needs import EVOLUTION, HARNESS, Offer, WantedNeeds
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
