"""Prometheus metrics of the server: requests by route, the queue of jobs, rollouts of channels, and webhooks.

Labels are route templates and kinds of jobs, never paths, namespaces or repositories: those are private, and unbounded
in number. Of several server processes, each writes its numbers to files in PROMETHEUS_MULTIPROC_DIR, and any of them
answers for all.
"""

import os
from collections.abc import Iterator
from importlib.metadata import version
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from registry.domain.jobs import queue
from registry.domain.rollouts import fleet
from registry.domain.webhooks import deliveries
from registry.transfer.resources import Resources

SECONDS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
"""The upper bounds of the histogram: a resolved channel takes 2 ms, an upload minutes."""
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
SHARED_DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"


class Metrics(Protocol):
    """The metrics of a server or of a worker."""

    def rendered(self) -> bytes: ...


class ServerMetrics:
    """The metrics of one application."""

    def __init__(self, resources: Resources) -> None:
        own = CollectorRegistry()
        labels = ("method", "route", "status")
        self._requests = Counter("adaptory_http_requests", "Requests that have ended.", labels, registry=own)
        self._seconds = Histogram(
            "adaptory_http_request_duration_seconds",
            "Time until a response has been sent.",
            ("method", "route"),
            registry=own,
            buckets=SECONDS,
        )
        self._shown = own
        if os.environ.get(SHARED_DIRECTORY):
            self._shown = CollectorRegistry()
            MultiProcessCollector(self._shown)  # pyright: ignore[reportUnknownArgumentType]  (it registers itself)
        self._shown.register(_ScrapedRows(resources))

    def observe(self, method: str, route: str | None, status: int, seconds: float) -> None:
        """Counts a request. `route` is a template, None if none matched."""
        named = method if method in METHODS else "other", route or "none"
        self._requests.labels(*named, str(status)).inc()
        self._seconds.labels(*named).observe(seconds)

    def rendered(self) -> bytes:
        """All metrics in the text format."""
        return generate_latest(self._shown)


class _ScrapedRows(Collector):
    """The queue, the rollouts and the webhooks, read at each scrape."""

    def __init__(self, resources: Resources) -> None:
        self._resources = resources

    def collect(self) -> Iterator[GaugeMetricFamily]:
        build = GaugeMetricFamily("adaptory_build_info", "The version of the server.", labels=("version",))
        build.add_metric((version("adaptory"),), 1)
        yield build
        with self._resources.read() as session:
            waiting = queue.unfinished(session)
            rollouts = fleet.counts_of_all(session, self._resources.clock())
            kept = fleet.yanked_channels(session)
            owed, owed_since = deliveries.counts(session)
        jobs = GaugeMetricFamily(
            "adaptory_jobs",
            "Jobs that are queued, running, or stalled because their worker fell silent.",
            labels=("kind", "state"),
        )
        oldest = GaugeMetricFamily(
            "adaptory_oldest_queued_job_seconds", "Age of the oldest queued job.", labels=("kind",)
        )
        now = self._resources.clock()
        for kind, state, count, since in waiting:
            jobs.add_metric((kind, state), count)
            if state == "queued":
                oldest.add_metric((kind,), max(0.0, (now - since).total_seconds()))
        yield jobs
        yield oldest
        nodes = GaugeMetricFamily(
            "adaptory_rollout_nodes", "Nodes that follow a channel, once for each channel, by state.", labels=("state",)
        )
        for state, count in rollouts.items():
            nodes.add_metric((state,), count)
        yield nodes
        yield GaugeMetricFamily("adaptory_yanked_channels", "Channels that serve a yanked release.", value=kept)
        sent = GaugeMetricFamily(
            "adaptory_webhook_deliveries",
            "Deliveries to webhooks by state; those that ended are counted for 30 days.",
            labels=("state",),
        )
        for state, count in owed.items():
            sent.add_metric((state,), count)
        yield sent
        age_s = max(0.0, (now - owed_since).total_seconds()) if owed_since else 0.0
        text = "Age of the oldest delivery that is neither delivered nor dead; 0 without one."
        yield GaugeMetricFamily("adaptory_oldest_webhook_delivery_seconds", text, value=age_s)
