"""Webhooks: webhook add | list | deliveries | replay | test | rotate | remove."""

from typing import Annotated
from urllib.parse import quote

import typer

from registry import wire
from registry.cli.console import render
from registry.cli.console.connect import connected
from registry.cli.console.groups import group
from registry.cli.console.render import JsonFlag
from registry.errors import Usage
from registry.formats.references import parse_repository

webhook_app = group("webhook", "Send events of a namespace to other systems.")
Id = Annotated[str, typer.Argument(metavar="ID", help="As `adaptory webhook list` shows it.")]


@webhook_app.command("add")
def add(
    url: Annotated[str, typer.Argument(help="The receiver's https address.")],
    namespace: Annotated[str | None, typer.Option(help="The namespace; without it, all of the registry.")] = None,
    repository: Annotated[str | None, typer.Option("--repo", help="Only this repository, such as acme/sql.")] = None,
    event: Annotated[list[str] | None, typer.Option(help="Such as channel.moved; repeat it. All by default.")] = None,
    format_: Annotated[str, typer.Option("--format", help="cloudevents or slack.")] = "cloudevents",
    json: JsonFlag = False,
) -> None:
    """Send events to an address; prints the secret that signs them, once. Needs the role admin."""
    body: dict[str, object] = {"namespace": namespace, "url": url, "format": format_}
    if repository is not None:
        named = parse_repository(repository)
        if namespace not in (None, named.namespace):
            raise Usage("bad_repository", f"{named} is not in the namespace {namespace}.", subject=str(named))
        body |= {"namespace": named.namespace, "repository": named.name}
    if event:
        body["events"] = event
    with connected() as connection:
        document = connection.api.post("/v1/webhooks", body, wire.webhooks.NewWebhookOut)
    _show_secret(document, json)


@webhook_app.command("list")
def list_webhooks(
    namespace: Annotated[str | None, typer.Option(help="Only those of this namespace.")] = None, json: JsonFlag = False
) -> None:
    """List the webhooks that you administer."""
    with connected() as connection:
        items = list(connection.api.pages("/v1/webhooks", wire.webhooks.WebhookOut, namespace=namespace))
    rows = [
        (row.id, row.repository or row.namespace or "all", row.format, row.url, ", ".join(row.events)) for row in items
    ]
    render.listing(items, json, ("webhook", "events of", "format", "address", "events"), rows)
    for row in items:
        if not row.signed and not json:
            render.warn(f"webhook {row.id} has no secret, so it gets nothing: `adaptory webhook rotate {row.id}`")


@webhook_app.command("deliveries")
def list_deliveries(
    webhook: Id,
    state: Annotated[str | None, typer.Option(help="pending, failed, delivered or dead.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Maximum number.")] = 20,
    cursor: Annotated[str | None, typer.Option("--cursor", help="`next` of the previous page.")] = None,
    json: JsonFlag = False,
) -> None:
    """List what a webhook was sent and is owed, newest first."""
    with connected() as connection:
        path = f"{_path(webhook)}/deliveries"
        items, more = connection.api.first(path, wire.webhooks.DeliveryOut, limit, cursor=cursor, state=state)
    rows = [
        (
            row.id,
            row.event,
            row.ordered_by,
            row.state,
            row.attempts,
            row.status or row.error,
            render.second(row.created_at),
        )
        for row in items
    ]
    columns = ("delivery", "event", "of", "state", "attempts", "answer", "at")
    render.document({"items": items, "next": more}, json, lambda: render.table("", columns, rows))
    render.more(more, json)


@webhook_app.command("replay")
def replay(
    webhook: Id,
    delivery: Annotated[int | None, typer.Argument(help="As `adaptory webhook deliveries` shows it.")] = None,
    all_dead: Annotated[bool, typer.Option("--all-dead", help="All that are dead, in their order.")] = False,
    json: JsonFlag = False,
) -> None:
    """Send a delivery again, with the same webhook-id."""
    if (delivery is None) is not all_dead:
        raise Usage("bad_replay", "Name one delivery, or use --all-dead.")
    with connected() as connection:
        if delivery is None:
            count = connection.api.post(f"{_path(webhook)}/replay", {}, wire.webhooks.ReplayedOut)
            render.document(count, json, lambda: render.out(f"{count.replayed} go out again"))
            return
        path = f"{_path(webhook)}/deliveries/{delivery}/replay"
        document = connection.api.post(path, {}, wire.webhooks.DeliveryOut)
    render.document(document, json, lambda: render.out(f"delivery {document.id} goes out again"))


@webhook_app.command("test")
def send_test(webhook: Id, json: JsonFlag = False) -> None:
    """Send a webhook the event webhook.test. `adaptory webhook deliveries` shows what came of it."""
    with connected() as connection:
        document = connection.api.post(f"{_path(webhook)}/test", {}, wire.webhooks.DeliveryOut)
    render.document(document, json, lambda: render.out(f"a worker sends delivery {document.id}"))


@webhook_app.command("rotate")
def rotate(webhook: Id, json: JsonFlag = False) -> None:
    """Replace a webhook's secret and print the new one. For 24 hours, the former one signs too."""
    with connected() as connection:
        document = connection.api.post(f"{_path(webhook)}/rotate", {}, wire.webhooks.NewWebhookOut)
    _show_secret(document, json)


@webhook_app.command("remove")
def remove(webhook: Id, json: JsonFlag = False) -> None:
    """Remove a webhook. What it is still owed is not sent any more."""
    with connected() as connection:
        document = connection.api.delete(_path(webhook), wire.webhooks.WebhookOut)
    render.document(document, json, lambda: render.out(f"removed {document.id}, {document.url}"))


def _path(webhook: str) -> str:
    return f"/v1/webhooks/{quote(webhook, safe='')}"


def _show_secret(document: "wire.webhooks.NewWebhookOut", json: bool) -> None:
    render.document(document, json, lambda: render.out(document.secret))
    if not json:
        render.say(f"webhook {document.id} to {document.url}; this secret is not shown again")
