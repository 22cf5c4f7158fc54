"""`/healthz` and `/metrics` of an agent, from its last report."""

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CollectorRegistry, Gauge, generate_latest

from registry.errors import Unavailable
from registry.wire.fleet import NodeReportIn

STUCK_S = 180.0
"""After that long without a round, the process should be restarted: a round that waits for a server takes less."""


class Health:
    """The last report, the time of the last round, and what is wrong. Thread-safe."""

    def __init__(self) -> None:
        self._lock, self._at_s = threading.Lock(), time.monotonic()
        self._report: NodeReportIn | None = None
        self._errors = {"registry": "", "round": "", "report": "", "watch": ""}

    def record(self, report: NodeReportIn) -> None:
        """Records the report of a round."""
        with self._lock:
            self._report = report

    def record_error(self, of: str, error: str) -> None:
        """Records what is wrong with following the registry, with rounds, or with reports of the node or of figures;
        empty if nothing is. A round counts, whether it failed or not."""
        with self._lock:
            self._errors[of] = error
            if of == "round":
                self._at_s = time.monotonic()

    def document(self) -> dict[str, object]:
        """`status` is following, degraded (servers keep what they serve, and `problems` says why) or stuck."""
        with self._lock:
            report, age_s, problems = self._report, time.monotonic() - self._at_s, self._problems()
        status = "stuck" if age_s > STUCK_S else "degraded" if problems or report is None else "following"
        return {
            "status": status,
            "problems": problems,
            "seconds_since_round": round(age_s, 1),
            "report": report.model_dump(mode="json") if report else None,
        }

    def _problems(self) -> list[str]:
        problems, report = [error for error in self._errors.values() if error], self._report
        if report is not None:
            of_servers = [row.error for row in report.servers if row.error]
            problems += [
                f"{row.channel}: {row.error}" for row in report.channels if row.error not in (None, *of_servers)
            ]
            problems += of_servers
        return problems

    def metrics(self) -> bytes:
        """Gauges in the text format of Prometheus."""
        registry = CollectorRegistry()
        ready = Gauge("adaptory_mirror_server_ready", "1 if the server answers.", ["server"], registry=registry)
        channel = Gauge(
            "adaptory_mirror_channel", "1 for each channel in its state.", ["channel", "state"], registry=registry
        )
        followed = Gauge("adaptory_mirror_registry_followed", "1 if the registry is followed.", registry=registry)
        problems = Gauge("adaptory_mirror_problems", "How many problems /healthz lists.", registry=registry)
        age = Gauge("adaptory_mirror_round_age_seconds", "Seconds since the last round.", registry=registry)
        with self._lock:
            report, age_s, lost = self._report, time.monotonic() - self._at_s, bool(self._errors["registry"])
            problems.set(len(self._problems()))
        followed.set(not lost)
        age.set(age_s)
        for row in report.channels if report else ():
            channel.labels(row.channel, row.state).set(1)
        for row in report.servers if report else ():
            ready.labels(row.url).set(row.ready)
        return generate_latest(registry)


def serve(health: Health, host: str, port: int) -> Callable[[], None]:
    """Answers in a thread. Returns what ends it. Raises Unavailable if the port is taken."""

    class Handler(BaseHTTPRequestHandler):
        timeout = 10.0

        def do_GET(self) -> None:
            if self.path == "/healthz":
                document = health.document()
                status = 503 if document["status"] == "stuck" else 200
                self._answer(status, "application/json", json.dumps(document).encode())
            elif self.path == "/metrics":
                self._answer(200, "text/plain; version=0.0.4", health.metrics())
            else:
                self._answer(404, "text/plain", b"/healthz and /metrics are here.\n")

        def _answer(self, status: int, kind: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it so
            pass

    try:
        server = ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        raise Unavailable(
            "port_unusable", f"{host}:{port} cannot be used: {error.strerror}.", subject=f"{host}:{port}"
        ) from error
    threading.Thread(target=server.serve_forever, name="health", daemon=True).start()
    return server.shutdown
