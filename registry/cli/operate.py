"""Running a registry: serve, worker, migrate, jobs, cancel."""

import gc
import ipaddress
import signal
import threading
from itertools import islice
from typing import Annotated

import typer

from registry.cli import render
from registry.cli.connect import connected, load_settings
from registry.cli.render import JsonFlag
from registry.errors import NotAllowed

Limit = Annotated[int, typer.Option(min=1, help="At most so many.")]

STOP_S = 30.0
"""How long a server that stops waits for its worker to hand its job back."""


def register(root: typer.Typer) -> None:
    for command in (serve, worker, migrate, jobs, cancel, audit):
        root.command()(command)


def serve(
    host: Annotated[str, typer.Option(help="A loopback address.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8470,
    with_worker: Annotated[
        bool, typer.Option("--worker/--no-worker", help="Do compositions in this process too.")
    ] = True,
) -> None:
    """Serve the REST API of the registry in $ADAPTORY_HOME, with a worker beside it."""
    import uvicorn

    from registry.resources import open_resources
    from registry.web.app import create_app
    from registry.worker.loop import run_worker
    from registry.worker.steps import KINDS

    if not _is_loopback(host):
        raise NotAllowed(
            "not_loopback",
            f"Without tokens the registry listens on loopback only, not on {host}.",
            subject=host,
            next_step="Use --host 127.0.0.1, and a proxy that asks who is there.",
        )
    resources = open_resources(load_settings())
    stop = threading.Event()
    thread = threading.Thread(target=run_worker, args=(resources, KINDS, stop), name="worker", daemon=True)
    if with_worker:
        thread.start()
    application = create_app(resources)
    # What lives as long as the process need not be looked at again: full collections took 80 ms each.
    gc.collect()
    gc.freeze()
    try:
        uvicorn.run(application, host=host, port=port, log_level="warning", server_header=False)
    finally:
        stop.set()
        if with_worker:
            thread.join(STOP_S)
        resources.close()


def worker() -> None:
    """Do jobs until told to stop, then hand the one in hand back. Any number of these may run beside the servers."""
    from registry.resources import open_resources
    from registry.worker.loop import run_worker
    from registry.worker.steps import KINDS

    resources = open_resources(load_settings())
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stop.set())
    render.say("waiting for jobs")
    try:
        run_worker(resources, KINDS, stop)
    finally:
        resources.close()


def migrate(json: JsonFlag = False) -> None:
    """Bring the database to this version's schema."""
    from registry.db import Database, head_revision, schema_revision
    from registry.db import migrate as run_migrations

    settings = load_settings()
    if settings.database_url is None:
        settings.home_directory.mkdir(parents=True, exist_ok=True)
    database = Database(settings.effective_database_url)
    before = schema_revision(database)
    run_migrations(database)
    told = {"database": database.url.render_as_string(hide_password=True), "from": before, "to": head_revision()}
    database.close()
    render.document(told, json, lambda: print(f"{told['database']}: schema {before or 'none'} -> {told['to']}"))


def jobs(
    job: Annotated[int | None, typer.Argument(metavar="[ID]")] = None, limit: Limit = 50, json: JsonFlag = False
) -> None:
    """Jobs, the newest first, or one of them."""
    with connected() as connection:
        found = (
            [connection.api.get(f"/v1/jobs/{job}")] if job else list(islice(connection.api.pages("/v1/jobs"), limit))
        )
    rows = [
        (
            row["id"],
            row["kind"],
            row["state"],
            [f"{step['name']}: {step['state']}" for step in row["steps"]],
            row["created_by"],
        )
        for row in found
    ]
    told = found[0] if job else {"items": found, "next": None}
    render.document(told, json, lambda: render.table("", ("job", "kind", "state", "steps", "by"), rows))


def cancel(job: Annotated[int, typer.Argument(metavar="ID")], json: JsonFlag = False) -> None:
    """Stop a job; nothing of it is published."""
    with connected() as connection:
        found = connection.api.post(f"/v1/jobs/{job}/cancel")
    render.document(found, json, lambda: print(f"job {found['id']}: {found['state']}"))


def audit(
    subject: Annotated[str | None, typer.Option(help="acme/sql:1.0.0, acme/sql@prod, ...")] = None,
    limit: Limit = 1000,
    json: JsonFlag = False,
) -> None:
    """What was done, by whom, in order."""
    with connected() as connection:
        found = list(islice(connection.api.pages("/v1/audit", subject=subject), limit))
    rows = [(row["id"], row["at"][:19], row["actor"], row["act"], row["subject"]) for row in found]
    render.document(
        {"items": found, "next": None}, json, lambda: render.table("", ("id", "at", "actor", "act", "subject"), rows)
    )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
