"""Running a registry: serve, worker, migrate, audit."""

import signal
import socket
import threading
from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing, contextmanager
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from registry.cli.console import render
from registry.cli.console.connect import own_settings
from registry.cli.console.groups import root
from registry.cli.console.render import JsonFlag
from registry.errors import NotAllowed, Unavailable, Usage

if TYPE_CHECKING:
    from registry.environment.settings import Settings
    from registry.transfer.resources import Resources
    from registry.worker.runner import Observe

After = Annotated[str | None, typer.Option("--cursor", help="`next` of the previous page.")]

AUDIT_ROWS = 1000
"""Default limit for a table, which people read."""
BACKLOG = 2048
MAX_PORT = 65_535
STOP_S = 30.0
"""How long a stopping server waits for its worker to requeue its job."""


@root.command()
def serve(
    host: Annotated[str, typer.Option(help="Any address but loopback requires ADAPTORY_ACCESS=tokens.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 chooses a free one.")] = 8470,
    with_worker: Annotated[
        bool, typer.Option("--worker/--no-worker", help="Also run queued jobs in this process.")
    ] = True,
    processes: Annotated[
        int,
        typer.Option(min=1, max=64, help="Number of server processes; one more supervises them."),
    ] = 1,
) -> None:
    """Serve the REST API and run a worker: for one user on loopback, or with ADAPTORY_ACCESS=tokens for many."""
    from registry.cli.operations.server import with_secret
    from registry.environment.network import is_loopback

    settings = own_settings()
    with_tokens = settings.access == "tokens"
    if not with_tokens and not is_loopback(host):
        raise _beyond_loopback(host)
    if with_worker and settings.engine.kind == "ray":
        raise Usage(
            "worker_beside_server",
            "A server does not run a worker of a Ray cluster: a worker that loses its cluster ends its process.",
            subject="--worker",
        )
    listener = _listen(host, port)
    url = _url_of(host, listener)
    with with_secret(settings, url) as (settings, lines):
        _serve(settings, listener, processes, [f"listening on {url}", *lines], with_worker=with_worker)


def _serve(
    settings: "Settings", listener: socket.socket, processes: int, lines: Sequence[str], *, with_worker: bool
) -> None:
    """Serves until this process is signalled to stop. Prints the lines once everything is open."""
    from registry.cli.operations.server import serve_beside, serve_here
    from registry.transfer.resources import open_resources
    from registry.worker.runner import run_worker
    from registry.worker.steps import KINDS

    resources = open_resources(settings, serving="serve")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # lets requests and the job end first, as with SIGTERM
    stop = threading.Event()
    observe = _traced(begin=processes > 1) if settings.traces and with_worker else None
    run = partial(run_worker, resources, KINDS, stop, observe=observe)
    thread = threading.Thread(target=run, name="worker", daemon=True)
    if with_worker:
        thread.start()
    threading.Thread(target=_probe_store, args=(resources,), name="probe", daemon=True).start()
    for line in lines:
        render.say(line)
    try:
        if processes == 1:
            serve_here(resources, listener)
        else:
            serve_beside(settings, listener, processes)
    finally:
        stop.set()
        if with_worker:
            thread.join(STOP_S)
        resources.close()


def _probe_store(resources: "Resources") -> None:
    from registry.environment.settings import S3Storage

    if isinstance(resources.settings.storage, S3Storage):
        from registry.transfer.store_facts import probe_if_unknown

        probe_if_unknown(resources.store)


def _beyond_loopback(host: str) -> NotAllowed:
    return NotAllowed(
        "not_loopback", f"Without tokens the registry listens on loopback only, not on {host}.", subject=host
    )


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise Unavailable(
            "port_unusable", f"Cannot listen on {host}:{port}: {error.strerror or error}.", subject=f"{host}:{port}"
        ) from error


class WorkerJobs(StrEnum):
    """Kinds of jobs, by the names that `adaptory jobs` shows."""

    COMPOSITION = "composition"
    CONFLICTS = "conflicts"
    EVALUATION = "evaluation"


@root.command()
def worker(
    only: Annotated[
        list[WorkerJobs] | None, typer.Option(help="Run only jobs of this kind. May be repeated; all by default.")
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(metavar="[HOST:]PORT", help="Serve /metrics and /healthz there; on loopback without a host."),
    ] = None,
) -> None:
    """Run queued jobs; on SIGTERM, requeue the current one. Any number of workers may run beside the servers."""
    from registry.transfer.resources import open_resources
    from registry.worker.runner import run_worker
    from registry.worker.steps import KINDS

    resources = open_resources(own_settings(), serving="worker")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stop.set())
    kinds = {kind.value: KINDS[kind.value] for kind in only} if only else KINDS
    render.say("waiting for jobs" + (": " + ", ".join(kinds) if only else ""))
    with closing(resources), ExitStack() as stack:
        observers = [stack.enter_context(_metrics_served(resources, metrics))] if metrics else []
        observers += [_traced(begin=True)] if resources.settings.traces else []
        run_worker(resources, kinds, stop, observe=partial(_observe_all, observers))


def _observe_all(observers: "list[Observe]", kind: str, step: str | None, state: str, seconds: float) -> None:
    for observe in observers:
        observe(kind, step, state, seconds)


def _traced(*, begin: bool) -> "Observe":
    """The tracer of jobs and steps. A server in the same process has begun their export."""
    from registry.transfer import traces

    if begin:
        traces.begin("adaptory-worker")
    return traces.trace_work


@contextmanager
def _metrics_served(resources: "Resources", address: str) -> "Generator[Observe]":
    """Serves the worker's metrics from a thread, with the rules of the server's own. Yields what counts."""
    from registry.cli.operations.server import serve_worker, with_secret
    from registry.environment.network import is_loopback
    from registry.worker.metrics import WorkerMetrics

    host, _, port = address.rpartition(":")
    host = host.strip("[]") or "127.0.0.1"
    if not port.isdecimal() or int(port) > MAX_PORT:
        raise Usage(
            "bad_address",
            f"Invalid address {address!r}.",
            subject=address,
            next_step="Write PORT or HOST:PORT, such as 9470.",
        )
    if resources.settings.access != "tokens" and not is_loopback(host):
        raise _beyond_loopback(host)
    metrics, listener = WorkerMetrics(), _listen(host, int(port))
    url = _url_of(host, listener)
    with with_secret(resources.settings, url) as (settings, _):
        arguments = resources, metrics, listener, settings.loopback_secret
        threading.Thread(target=serve_worker, args=arguments, name="metrics", daemon=True).start()
        render.say(f"metrics on {url}/metrics")
        yield metrics.observe


def _url_of(host: str, listener: socket.socket) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"


@root.command()
def migrate(json: JsonFlag = False) -> None:
    """Migrate the database to this version's schema."""
    from registry.transfer.resources import migrate_database

    done = migrate_database(own_settings())
    if done.connected and done.before not in (None, done.after):
        _name_connected(done.connected, works=done.works_before)
    document = {"database": done.database, "from": done.before, "to": done.after, "connected": done.connected}
    render.document(
        document, json, lambda: render.out(f"{done.database}: schema {done.before or 'none'} -> {done.after}")
    )


def _name_connected(others: Sequence[str], *, works: bool) -> None:
    if works:
        render.say("still connected; replace servers and workers of the version before:")
    else:
        render.say(
            "warning: the version before does not work with this schema; stop these processes if they are of it:"
        )
    for name in others:
        render.say(f"  {name}")
