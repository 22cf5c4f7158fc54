"""Server processes: this one alone, or several on one socket, supervised by this one."""

import gc
import json
import logging
import multiprocessing
import os
import shlex
import signal
import socket
import sys
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from registry.cli.console import render
from registry.environment import home
from registry.errors import RegistryError, Unavailable
from registry.sdk.connection import load_settings

if TYPE_CHECKING:
    from types import FrameType

    from fastapi import FastAPI
    from pydantic import SecretStr
    from uvicorn import Config
    from uvicorn.supervisors import Multiprocess

    from registry.environment.settings import Settings
    from registry.transfer.resources import Resources
    from registry.worker.metrics import WorkerMetrics


class JsonLines(logging.Formatter):
    """Writes log records as the access log writes its lines: a JSON object each."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        row = {"at": at, "level": record.levelname.lower(), "logger": record.name, "message": record.getMessage()}
        if record.exc_info:
            row["traceback"] = self.formatException(record.exc_info)
        return json.dumps(row)


JSON_LOG = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"json": {"()": JsonLines}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "json"}},
    "root": {"handlers": ["stderr"], "level": "WARNING"},
    "loggers": {"huggingface_hub": {"propagate": True}},  # which the command line has turned off
}
HUNG_S = 30
"""A process that has not answered a health check for this long is replaced."""


def serve_here(resources: "Resources", listener: socket.socket) -> None:
    """Serves in this process until it is signalled to stop; then returns or exits, so that the caller can clean up."""
    from uvicorn import Config, Server

    # The server re-raises the signal when it has stopped, and SIGTERM would kill the process immediately.
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(0))
    Server(Config(lambda: _application(resources), factory=True, **_options(resources.settings))).run([listener])


def serve_worker(
    resources: "Resources", metrics: "WorkerMetrics", listener: socket.socket, secret: "SecretStr | None"
) -> None:
    """Serves a worker's /metrics and /healthz until the process ends; runs in a thread. On loopback, it can require a
    secret, as a server does."""
    from uvicorn import Config, Server

    from registry.api.app import create_worker_app

    settings = resources.settings
    app = create_worker_app(resources, metrics, tokens=settings.access == "tokens", secret=_asked_for(settings, secret))
    Server(Config(app, **_options(resources.settings))).run([listener])


def serve_beside(settings: "Settings", listener: socket.socket, processes: int) -> None:
    """Serves from several processes until this one is signalled to stop; a process that dies or hangs is replaced.

    Each opens the registry itself, by the environment. Raises Unavailable if one of them cannot.
    """
    with TemporaryDirectory(prefix="adaptory-metrics-") as shared:
        os.environ.setdefault("PROMETHEUS_MULTIPROC_DIR", shared)  # any process answers for all
        _supervise(settings, listener, processes)


def _supervise(settings: "Settings", listener: socket.socket, processes: int) -> None:
    from uvicorn import Config
    from uvicorn.config import STARTUP_FAILURE

    config = Config(
        f"{__name__}:child_application",
        factory=True,
        workers=processes,
        timeout_worker_healthcheck=HUNG_S,
        **_options(settings),
    )
    logging.getLogger("uvicorn.error").setLevel(logging.INFO)  # reports which process died
    supervisor = _watch(config, listener)
    supervisor.run()
    if any(process.exitcode == STARTUP_FAILURE for process in supervisor.processes):
        raise Unavailable(
            "server_failed",
            "A server process could not start.",
            next_step="Fix the error printed above, and try again.",
        )


def _watch(config: "Config", listener: socket.socket) -> "Multiprocess":
    """The supervisor that keeps the configured number of processes alive."""
    from uvicorn.supervisors import Multiprocess

    class Supervised(Multiprocess):
        def keep_subprocess_alive(self) -> None:
            # Each process has its own copy of this end of the pipe. If ours stayed open, one that dies during a
            # health check would be waited for until it counts as hung.
            for process in self.processes:
                process.child_conn.close()
            super().keep_subprocess_alive()

    return Supervised(config, [listener])


def child_application() -> "FastAPI":
    """The application of a child process, which exits when its supervisor does."""
    from uvicorn.config import STARTUP_FAILURE

    from registry.transfer.resources import open_resources

    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    try:
        return _application(open_resources(load_settings(), serving="serve"))
    except RegistryError as error:
        render.fail(error, as_json=False)
        sys.exit(STARTUP_FAILURE)  # a retry would fail the same way


@contextmanager
def with_secret(settings: "Settings", url: str) -> "Generator[tuple[Settings, Sequence[str]]]":
    """Settings of a server at `url`, with a secret if it has a single user and other users of the machine must not
    reach it, and the lines to print about that. Processes that this one starts share the secret, which ends with the
    server."""
    from pydantic import SecretStr

    if settings.access == "tokens" or settings.loopback_open:
        yield settings, ()
        return
    directory, given, parts = settings.home_directory, settings.loopback_secret, urlsplit(url)
    address = parts.hostname or "", parts.port or 80
    with home.serving(directory, *address, given.get_secret_value() if given else None) as (secret, code):
        os.environ["ADAPTORY_LOOPBACK_SECRET"] = secret
        path, link = (shlex.quote(str(of(directory, *address))) for of in (home.secret_path, home.link_path))
        shown = code if sys.stderr.isatty() else f"$(cat {link})"  # others may read where a log goes
        lines = (
            f"pages: {url}/login?code={shown} signs a browser in, once",
            f"hub clients: export HF_ENDPOINT={url} HF_TOKEN=$(cat {path})",
        )
        yield settings.model_copy(update={"loopback_secret": SecretStr(secret)}), lines


def _options(settings: "Settings") -> dict[str, Any]:
    """Options for every server process."""
    from uvicorn.config import LOGGING_CONFIG

    from registry.api.http.protocol import BoundedHttp

    return {
        "log_config": JSON_LOG if settings.access_log == "json" else LOGGING_CONFIG,
        "http": BoundedHttp,
        "log_level": "warning",
        "access_log": False,  # it contains paths and queries; ours is `registry.api.http.exchanges`
        "server_header": False,
        # Longer than clients and load balancers keep idle connections (httpx 5 s, most balancers 60 s): the side that
        # closes at the moment at which the other sends breaks a request. uvicorn's 5 s did, in 1 of 256 snapshots.
        "timeout_keep_alive": 75,
        # By default it trusts forwarded addresses from any program on this machine.
        "proxy_headers": bool(settings.trusted_proxies),
        "forwarded_allow_ips": settings.trusted_proxies,
    }


def _application(resources: "Resources") -> "FastAPI":
    from registry.api.app import create_app

    settings = resources.settings
    secret = _asked_for(settings, settings.loopback_secret)
    tokens = settings.access == "tokens"
    application = create_app(resources, tokens=tokens, secret=secret, access_log=settings.access_log)
    if resources.settings.traces:
        from registry.transfer import traces

        traces.begin("adaptory-server")
        traces.trace_requests(application)
    # Objects that live as long as the process need no further collection: full collections took 80 ms each.
    gc.collect()
    gc.freeze()
    _drain_on_sigterm(application, resources.settings.drain_s)
    return application


def _asked_for(settings: "Settings", secret: "SecretStr | None") -> str | None:
    """The secret that requests need; None with tokens, and where everybody of the machine may come."""
    is_open = settings.access == "tokens" or settings.loopback_open
    return None if is_open or secret is None else secret.get_secret_value()


def _drain_on_sigterm(application: "FastAPI", drain_s: float) -> None:
    """Makes the first SIGTERM turn /readyz, and only the second one, which comes by itself after `drain_s`, end the
    server. uvicorn has set its own handler when it loads the application."""
    for number in (signal.SIGINT, signal.SIGTERM):
        _end_streams_on(number, application)
    stop = signal.getsignal(signal.SIGTERM)
    if not drain_s or not callable(stop):
        return

    def drain(number: int, frame: "FrameType | None") -> None:
        if application.state.draining:
            stop(number, frame)
            return
        application.state.draining = True
        again = threading.Timer(drain_s, os.kill, (os.getpid(), signal.SIGTERM))
        again.daemon = True
        again.start()

    signal.signal(signal.SIGTERM, drain)


def _end_streams_on(number: signal.Signals, application: "FastAPI") -> None:
    """Ends streams of events before the signal's own handler runs: uvicorn waits for every answer."""
    stop = signal.getsignal(number)
    if not callable(stop):
        return

    def end(received: int, frame: "FrameType | None") -> None:
        application.state.draining = True
        stop(received, frame)

    signal.signal(number, end)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
