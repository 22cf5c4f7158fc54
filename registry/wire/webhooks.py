"""Documents of webhooks and their deliveries."""

from datetime import datetime
from typing import Literal, Self

from pydantic import Field, model_validator

from registry.formats.webhooks import EVENTS, MAX_URL, EventName, Format
from registry.wire.document import Wire, WireIn

State = Literal["pending", "failed", "delivered", "dead"]


class WebhookIn(WireIn):
    """`namespace` is null for the events of the whole registry, which needs an admin of it. `repository`, a name
    without the namespace, limits it to one. `events` are all unless given."""

    namespace: str | None = Field(max_length=64)
    repository: str | None = Field(default=None, max_length=64)
    url: str = Field(max_length=MAX_URL)
    format: Format = "cloudevents"
    events: list[EventName] = Field(default=list(EVENTS), min_length=1, max_length=len(EVENTS))

    @model_validator(mode="after")
    def _name_both(self) -> Self:
        if self.repository is not None and self.namespace is None:
            raise ValueError("a repository needs its namespace")
        return self


class DeliveryOut(Wire):
    """`failed` means that the last attempt failed and that another one follows at `next_at`; `dead`, that none does.
    `status` is that of the last answer; without an answer, `error` says why. `message_id` is the header
    `webhook-id`."""

    id: int
    event: str
    message_id: str
    ordered_by: str = Field(description="Deliveries with the same value go out one after the other.")
    state: State
    attempts: int
    status: int | None
    error: str | None
    created_at: datetime
    tried_at: datetime | None
    next_at: datetime | None


class WebhookOut(Wire):
    """`url` is shown without its query and, for Slack, without its path. `signed` is false for a webhook from a
    restored backup: it gets nothing until its secret is rotated."""

    id: str
    namespace: str | None
    repository: str | None
    url: str
    format: Format
    events: list[str]
    signed: bool
    created_at: datetime
    created_by: str


class NewWebhookOut(WebhookOut):
    """`secret` is shown only once."""

    secret: str


class ReplayedOut(Wire):
    """The number of deliveries that go out again."""

    replayed: int
