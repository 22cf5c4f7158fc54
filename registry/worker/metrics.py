"""Prometheus metrics of a worker: its jobs and their steps. Labels are job kinds and step names, never the name of a
namespace or repository."""

from prometheus_client import CollectorRegistry, Histogram, ProcessCollector, generate_latest

SECONDS = (0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 12 * 3600)
"""The upper bounds of the histograms: a lock takes milliseconds, an evaluation of a large model hours."""


class WorkerMetrics:
    """The metrics of one worker process."""

    def __init__(self) -> None:
        self._shown = CollectorRegistry()
        ProcessCollector(registry=self._shown)
        self._jobs = Histogram(
            "adaptory_worker_job_seconds",
            "Time from taking a job until it ended.",
            ("kind", "state"),
            registry=self._shown,
            buckets=SECONDS,
        )
        self._steps = Histogram(
            "adaptory_worker_step_seconds",
            "Time of a job's step.",
            ("kind", "step", "state"),
            registry=self._shown,
            buckets=SECONDS,
        )

    def observe(self, kind: str, step: str | None, state: str, seconds: float) -> None:
        """Counts a step that has ended or, without a step, a job."""
        if step is None:
            self._jobs.labels(kind, state).observe(seconds)
        else:
            self._steps.labels(kind, step, state).observe(seconds)

    def rendered(self) -> bytes:
        """All metrics in the text format."""
        return generate_latest(self._shown)
