"""Webhooks of namespaces and of the registry, which their admins manage."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session

from registry.database.tables import Webhook, WebhookDelivery, WebhookSecret
from registry.domain.access import audit, namespaces, outbox, tokens
from registry.domain.access.audit import Act, Actor
from registry.domain.access.roles import EVERYWHERE, Role, granted, permit
from registry.errors import NotFound, Refused
from registry.formats.webhooks import new_secret, shown_url

OVERLAP = timedelta(hours=24)
"""How long the former secret signs too after a rotation."""
MAX_WEBHOOKS = 50
"""Of one namespace, and of the registry."""
_UNTRACKED = {"synchronize_session": False}


@dataclass(frozen=True, slots=True)
class NewWebhook:
    """`namespace` is None for the events of the whole registry; `repository` (NAMESPACE/NAME) limits it to one."""

    namespace: str | None
    repository: str | None
    url: str
    format: str
    events: Sequence[str]


def add(session: Session, actor: Actor, new: NewWebhook) -> tuple[Webhook, str]:
    """Adds a webhook. Returns it and its secret. The caller has parsed its address."""
    permit(actor, Role.ADMIN, new.namespace or EVERYWHERE)
    if new.namespace is not None:
        namespaces.find_for_share(session, new.namespace)
    own = select(func.count()).select_from(Webhook).where(Webhook.namespace.is_not_distinct_from(new.namespace))
    if (session.scalar(own) or 0) >= MAX_WEBHOOKS:
        raise Refused(
            "too_many_webhooks",
            f"{new.namespace or 'The registry'} has {MAX_WEBHOOKS} webhooks, the most there may be.",
            subject=new.namespace or EVERYWHERE,
        )
    row = Webhook(
        id=tokens.random_id(),
        namespace=new.namespace,
        repository=new.repository,
        url=new.url,
        format=new.format,
        events=sorted(set(new.events)),
        created_at=actor.at,
        created_by=actor.name,
    )
    session.add(row)
    session.flush()
    secret = _add_secret(session, row)
    after = {name: value for name, value in _described(row).items() if value is not None}
    audit.record(session, actor, Act.WEBHOOK_ADD, _subject(row), namespace=row.namespace, after=after)
    return row, secret


def list_page(session: Session, actor: Actor, *, namespace: str | None, after: str, limit: int) -> list[Webhook]:
    """The webhooks that the actor administers, by id: those of one namespace, or of all."""
    query = select(Webhook).where(granted(actor, Role.ADMIN).within(Webhook.namespace), Webhook.id > after)
    if namespace is not None:
        query = query.where(Webhook.namespace == namespace)
    return list(session.scalars(query.order_by(Webhook.id).limit(limit)))


def find(session: Session, actor: Actor, webhook_id: str) -> Webhook:
    """A webhook that the actor administers. Raises NotFound."""
    own = (Webhook.id == webhook_id, granted(actor, Role.ADMIN).within(Webhook.namespace))
    row = session.scalar(select(Webhook).where(*own))
    if row is None:
        raise NotFound(
            "webhook_unknown",
            f"Webhook {webhook_id[:16]} does not exist, or you do not administer it.",
            subject=webhook_id[:16],
        )
    return row


def remove(session: Session, actor: Actor, webhook_id: str) -> Webhook:
    """Removes a webhook with its deliveries, including those still owed."""
    row = find(session, actor, webhook_id)
    session.execute(delete(WebhookSecret).where(WebhookSecret.webhook_id == row.id), execution_options=_UNTRACKED)
    session.execute(delete(WebhookDelivery).where(WebhookDelivery.webhook_id == row.id), execution_options=_UNTRACKED)
    session.delete(row)
    session.flush()
    before = {name: value for name, value in _described(row).items() if value is not None}
    audit.record(session, actor, Act.WEBHOOK_REMOVE, _subject(row), namespace=row.namespace, before=before)
    return row


def rotate(session: Session, actor: Actor, webhook_id: str) -> tuple[Webhook, str]:
    """Gives a webhook another secret, and returns it. The former one signs too for `OVERLAP`; earlier ones end now."""
    row = find(session, actor, webhook_id)
    session.scalar(select(Webhook.id).where(Webhook.id == row.id).with_for_update())
    own = WebhookSecret.webhook_id == row.id
    former = delete(WebhookSecret).where(own, WebhookSecret.until.is_not(None))
    session.execute(former, execution_options=_UNTRACKED)
    ends = update(WebhookSecret).where(own).values(until=actor.at + OVERLAP)
    session.execute(ends, execution_options=_UNTRACKED)
    secret = _add_secret(session, row)
    audit.record(session, actor, Act.WEBHOOK_ROTATE, _subject(row), namespace=row.namespace)
    return row, secret


def send_test(session: Session, actor: Actor, webhook_id: str) -> WebhookDelivery:
    """Adds a delivery of a test."""
    row = find(session, actor, webhook_id)
    audit_id = audit.record(session, actor, Act.WEBHOOK_TEST, _subject(row), namespace=row.namespace)
    return session.get_one(WebhookDelivery, outbox.announce_test(session, audit_id, row.id, actor.at))


def _add_secret(session: Session, row: Webhook) -> str:
    secret = new_secret()
    session.add(WebhookSecret(webhook_id=row.id, secret=secret, until=None))
    session.flush()
    return secret


def _subject(row: Webhook) -> str:
    return f"webhook/{row.id}"


def _described(row: Webhook) -> dict[str, object]:
    """A webhook for the audit row, which has no secret."""
    shown = shown_url(row.url, row.format)
    return {"url": shown, "format": row.format, "events": row.events, "repository": row.repository}


def signed(session: Session, rows: Sequence[Webhook]) -> set[str]:
    """Those of the webhooks, by id, that have a secret; after a restored backup, none has."""
    query = select(WebhookSecret.webhook_id).where(WebhookSecret.webhook_id.in_([row.id for row in rows]))
    return set(session.scalars(query.where(WebhookSecret.until.is_(None))))
