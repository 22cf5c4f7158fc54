"""Changes that need a second admin: change list | show | approve | cancel, and the inbox."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar

import typer

from registry import wire
from registry.cli.console import render
from registry.cli.console.connect import connected
from registry.cli.console.groups import group, root
from registry.cli.console.render import JsonFlag
from registry.errors import Refused
from registry.sdk.connection import Connection

T = TypeVar("T")
changes = group("change", "Approve what needs a second admin in a namespace.")

Namespace = Annotated[str, typer.Argument(metavar="NAMESPACE", help="The namespace.")]
Id = Annotated[int, typer.Argument(metavar="ID", min=1, help="As `adaptory change list` shows it.")]


def made_or_requested(
    connection: Connection, namespace: str, change: Mapping[str, Any], make: Callable[[], T], *, json: bool
) -> T:
    """Makes a change or, where the namespace requires a second admin, requests it and ends the command."""
    try:
        return make()
    except Refused as error:
        if error.code != "second_admin_needed":
            raise
    row = connection.api.post(_path(namespace), {"change": dict(change)}, wire.changes.ChangeOut)
    render.document(row, json, lambda: _show(row))
    raise typer.Exit


@root.command()
def inbox(json: JsonFlag = False) -> None:
    """Show what waits for a person: promotions, and changes that need a second admin."""
    with connected() as connection:
        seen = connection.api.get("/v1/inbox?limit=100", wire.changes.InboxOut)
    rows = [
        (row.subject, row.summary, "; ".join(row.waits_for), row.actor, render.minute(row.expires_at), _approve(row))
        for row in seen.items
    ]
    columns = ("subject", "what", "waits for", "by", "until", "you may")
    render.document(seen, json, lambda: render.table("", columns, rows) if rows else render.out("nothing waits"))
    if seen.more:
        render.say("There is more than these.")


def _approve(row: "wire.changes.InboxItem") -> str:
    """The command by which the caller approves it; empty if the caller may not."""
    if not row.for_you:
        return ""
    if row.kind == "change":
        return f"adaptory change approve {row.namespace} {row.id}"
    repository, _, channel = row.subject.partition("@")
    return f"adaptory approve {repository}:{row.summary.rpartition(' ')[2]} --to {channel}"


@changes.command("list")
def list_changes(namespace: Namespace, json: JsonFlag = False) -> None:
    """List the changes of a namespace that wait or have waited for a second admin."""
    with connected() as connection:
        items = list(connection.api.pages(_path(namespace), wire.changes.ChangeOut))
    rows = [(row.id, row.state, row.summary, row.actor, row.ended_by, render.minute(row.expires_at)) for row in items]
    render.listing(items, json, ("change", "state", "what", "by", "ended by", "until"), rows, namespace)


@changes.command("show")
def show_change(namespace: Namespace, change: Id, json: JsonFlag = False) -> None:
    """Show a change: what it replaces, and by what."""
    with connected() as connection:
        row = connection.api.get(f"{_path(namespace)}/{change}", wire.changes.ChangeOut)
    render.document(row, json, lambda: _show(row))


@changes.command("approve")
def approve(namespace: Namespace, change: Id, json: JsonFlag = False) -> None:
    """Make a change that another admin requested."""
    _end(namespace, change, "approve", json)


@changes.command("cancel")
def cancel(namespace: Namespace, change: Id, json: JsonFlag = False) -> None:
    """Withdraw a change that waits."""
    _end(namespace, change, "cancel", json)


def _end(namespace: str, change: int, how: str, json: bool) -> None:
    with connected() as connection:
        row = connection.api.post(f"{_path(namespace)}/{change}/{how}", None, wire.changes.ChangeOut)
    render.document(row, json, lambda: _show(row))
    if row.state in ("refused", "conflict"):
        raise typer.Exit(row.error["exit_code"] if row.error else 1)


def _path(namespace: str) -> str:
    return f"/v1/namespaces/{namespace}/changes"


def _show(row: "wire.changes.ChangeOut") -> None:
    render.out(f"change {row.id} of {row.namespace}: {row.summary}")
    ended = "cancelled by" if row.state == "cancelled" else "approved by"
    render.lines("", [("state", row.state), ("requested by", row.actor), (ended, row.ended_by)])
    for line in _difference(row.before, row.after):
        render.out(f"  {line}")
    if row.error:
        render.say(f"{row.error['detail']} {row.error['next']}".strip())
    if row.state == "pending":
        approve = f"adaptory change approve {row.namespace} {row.id}"
        render.say(f"waits for a second admin until {render.minute(row.expires_at)} UTC: `{approve}`")


def _difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The lines of YAML that the change removes (-) and adds (+)."""
    from difflib import ndiff

    import yaml

    old, new = (yaml.safe_dump(state, sort_keys=False, allow_unicode=True).splitlines() for state in (before, after))
    return [line for line in ndiff(old, new) if line.startswith(("- ", "+ "))]
