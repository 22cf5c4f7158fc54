"""Keys of workers: worker-key list | revoke."""

from typing import Annotated
from urllib.parse import quote

import typer

from registry import wire
from registry.cli.console import render
from registry.cli.console.connect import connected
from registry.cli.console.groups import group
from registry.cli.console.render import JsonFlag

_PATH = "/v1/worker-keys"
worker_key_app = group("worker-key", "Manage the keys by which workers attest what they measure.")


@worker_key_app.command("list")
def list_keys(json: JsonFlag = False) -> None:
    """List the keys of workers."""
    with connected() as connection:
        items = list(connection.api.pages(_PATH, wire.quality.WorkerKeyOut))
    rows = [
        (row.id[:12], row.worker, render.minute(row.created_at), f"by {row.revoked_by}" if row.revoked_by else "")
        for row in items
    ]
    render.listing(items, json, ("key", "worker", "registered", "revoked"), rows)


@worker_key_app.command("revoke")
def revoke(
    key: Annotated[str, typer.Argument(metavar="KEY", help="As `adaptory worker-key list` shows it.")],
    json: JsonFlag = False,
) -> None:
    """Revoke a worker's key. What it signed counts as stated from then on, and its worker measures nothing further."""
    with connected() as connection:
        row = connection.api.delete(f"{_PATH}/{quote(key, safe='')}", wire.quality.WorkerKeyOut)
    render.document(row, json, lambda: render.out(f"revoked {row.id[:12]} of the worker {row.worker}"))
