"""Webhooks: receivers of events of a namespace or of the registry, and what they were sent."""

from typing import Annotated

from fastapi import APIRouter, Path, Query, Response

from registry.api.http.pagination import Cursor, Limit, decode_cursor, decode_number, page
from registry.api.http.request import ResourcesOf, RowId
from registry.api.http.routes import Route
from registry.api.http.rules import AdminSomewhere
from registry.api.routes.views import delivery_view
from registry.database.tables import Webhook
from registry.domain.webhooks import deliveries, hooks
from registry.domain.webhooks.hooks import NewWebhook
from registry.environment.network import parse_networks
from registry.formats.references import parse_name, parse_repository
from registry.formats.webhooks import parse_receiver, shown_url
from registry.wire.document import Page
from registry.wire.webhooks import DeliveryOut, NewWebhookOut, ReplayedOut, State, WebhookIn, WebhookOut

router = APIRouter(prefix="/v1", tags=["webhooks"], route_class=Route)

WEBHOOK = "/webhooks/{webhook_id}"
WebhookId = Annotated[str, Path(max_length=64)]


@router.post("/webhooks", status_code=201)
def add_webhook(body: WebhookIn, resources: ResourcesOf, actor: AdminSomewhere, response: Response) -> NewWebhookOut:
    """Add a webhook. Only this response contains its secret. Needs the role admin in the namespace."""
    parse_receiver(body.url, parse_networks(resources.settings.webhook_networks))
    repository = str(parse_repository(f"{body.namespace}/{body.repository}")) if body.repository is not None else None
    namespace = parse_name(body.namespace, "namespace") if body.namespace is not None else None
    new = NewWebhook(namespace, repository, body.url, body.format, body.events)
    with resources.write() as session:
        row, secret = hooks.add(session, actor, new)
    response.headers["Cache-Control"] = "no-store"
    return NewWebhookOut(**_view(row, signed=True).model_dump(), secret=secret)


@router.get("/webhooks")
def list_webhooks(
    resources: ResourcesOf,
    actor: AdminSomewhere,
    namespace: Annotated[str | None, Query(max_length=64)] = None,
    limit: Limit = 50,
    cursor: Cursor = None,
) -> Page[WebhookOut]:
    """List the webhooks that the caller administers, or those of one namespace."""
    with resources.read() as session:
        rows = hooks.list_page(session, actor, namespace=namespace, after=decode_cursor(cursor), limit=limit + 1)
        signed = hooks.signed(session, rows)
        return page([_view(row, signed=row.id in signed) for row in rows], limit, [row.id for row in rows])


@router.delete(WEBHOOK)
def remove_webhook(webhook_id: WebhookId, resources: ResourcesOf, actor: AdminSomewhere) -> WebhookOut:
    """Remove a webhook. What it is still owed is not sent any more."""
    with resources.write() as session:
        return _view(hooks.remove(session, actor, webhook_id), signed=False)


@router.post(WEBHOOK + "/rotate")
def rotate_webhook(
    webhook_id: WebhookId, resources: ResourcesOf, actor: AdminSomewhere, response: Response
) -> NewWebhookOut:
    """Replace the secret. For 24 hours, the former one signs too. Only this response contains the new one."""
    with resources.write() as session:
        row, secret = hooks.rotate(session, actor, webhook_id)
    response.headers["Cache-Control"] = "no-store"
    return NewWebhookOut(**_view(row, signed=True).model_dump(), secret=secret)


@router.post(WEBHOOK + "/test", status_code=202)
def test_webhook(webhook_id: WebhookId, resources: ResourcesOf, actor: AdminSomewhere) -> DeliveryOut:
    """Send the event `webhook.test`. Its delivery shows what came of it."""
    with resources.write() as session:
        return delivery_view(hooks.send_test(session, actor, webhook_id))


@router.get(WEBHOOK + "/deliveries")
def list_deliveries(
    webhook_id: WebhookId,
    resources: ResourcesOf,
    actor: AdminSomewhere,
    state: State | None = None,
    limit: Limit = 50,
    cursor: Cursor = None,
) -> Page[DeliveryOut]:
    """List what the webhook was sent and is owed, newest first."""
    with resources.read() as session:
        before = decode_number(cursor)
        rows = deliveries.list_page(session, actor, webhook_id, state=state, before=before, limit=limit + 1)
        return page([delivery_view(row) for row in rows], limit, [row.id for row in rows])


@router.post(WEBHOOK + "/deliveries/{delivery_id}/replay", status_code=202)
def replay_delivery(
    webhook_id: WebhookId, delivery_id: RowId, resources: ResourcesOf, actor: AdminSomewhere
) -> DeliveryOut:
    """Send one delivery again, with the same `webhook-id`."""
    with resources.write() as session:
        return delivery_view(deliveries.replay(session, actor, webhook_id, delivery_id)[0])


@router.post(WEBHOOK + "/replay", status_code=202)
def replay_dead(webhook_id: WebhookId, resources: ResourcesOf, actor: AdminSomewhere) -> ReplayedOut:
    """Send all dead deliveries again, in their order."""
    with resources.write() as session:
        return ReplayedOut(replayed=len(deliveries.replay(session, actor, webhook_id, None)))


def _view(row: Webhook, *, signed: bool) -> WebhookOut:
    return WebhookOut.of(row, url=shown_url(row.url, row.format), signed=signed)
