"""The processes that answer: this one alone, or several behind one socket that this one watches over."""

import gc
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
from typing import TYPE_CHECKING, Any

from registry.cli import render
from registry.cli.connect import load_settings
from registry.errors import RegistryError, Unavailable

if TYPE_CHECKING:
    from fastapi import FastAPI
    from uvicorn import Config
    from uvicorn.supervisors import Multiprocess

    from registry.settings import Settings
    from registry.transfer.resources import Resources

HUNG_S = 30
"""A process that has not said a word for so long is replaced."""


def serve_here(resources: "Resources", listener: socket.socket) -> None:
    """Answers until this process is told to stop; then returns or exits, for the caller to end what is beside it."""
    from uvicorn import Config, Server

    # The server raises the signal again when it has ended, and SIGTERM would end the process where it stands.
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(0))
    Server(Config(_application(resources), **_options(resources.settings))).run([listener])


def serve_beside(settings: "Settings", listener: socket.socket, processes: int) -> None:
    """Answers from so many processes until this one is told to stop; one that dies or hangs is replaced.

    Each opens the registry anew, as the environment says. Raises Unavailable when one of them cannot.
    """
    from uvicorn import Config
    from uvicorn.config import STARTUP_FAILURE

    config = Config(
        f"{__name__}:child_application",
        factory=True,
        workers=processes,
        timeout_worker_healthcheck=HUNG_S,
        **_options(settings),
    )
    logging.getLogger("uvicorn.error").setLevel(logging.INFO)  # here it tells which process died
    supervisor = _watch(config, listener)
    supervisor.run()
    if any(process.exitcode == STARTUP_FAILURE for process in supervisor.processes):
        raise Unavailable(
            "server_failed", "A server process could not start.", next_step="See above for what it says, and repeat."
        )


def _watch(config: "Config", listener: socket.socket) -> "Multiprocess":
    """What keeps so many processes alive as the configuration says, once it runs."""
    from uvicorn.supervisors import Multiprocess

    class Watch(Multiprocess):
        def keep_subprocess_alive(self) -> None:
            # Each process has its own copy of its end. With ours open too, one that dies when it has just been
            # asked for a word would be waited for until it counts as hung.
            for process in self.processes:
                process.child_conn.close()
            super().keep_subprocess_alive()

    return Watch(config, [listener])


def child_application() -> "FastAPI":
    """For the server process that calls it, which lives no longer than the one that watches over it."""
    from uvicorn.config import STARTUP_FAILURE

    from registry.transfer.resources import open_resources

    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    try:
        return _application(open_resources(load_settings()))
    except RegistryError as error:
        render.fail(error, as_json=False)
        sys.exit(STARTUP_FAILURE)  # to try again would fail in the same way


def _options(settings: "Settings") -> dict[str, Any]:
    """Of every server, however many answer."""
    from registry.api.http.protocol import BoundedHttp

    return {
        "http": BoundedHttp,
        "log_level": "warning",
        "access_log": False,  # it has paths and queries in it; ours is `registry.api.http.exchanges`
        "server_header": False,
        # Left to itself it believes every program on this machine what it says of other addresses.
        "proxy_headers": bool(settings.trusted_proxies),
        "forwarded_allow_ips": settings.trusted_proxies,
    }


def _application(resources: "Resources") -> "FastAPI":
    from registry.api.app import create_app

    application = create_app(
        resources, tokens=resources.settings.access == "tokens", access_log=resources.settings.access_log
    )
    # What lives as long as the process need not be looked at again: full collections took 80 ms each.
    gc.collect()
    gc.freeze()
    return application


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
