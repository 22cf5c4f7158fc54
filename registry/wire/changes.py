"""Changes of a namespace that a second admin approves."""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, Field

from registry.wire.access import NamespaceIn, RetentionIn, RoleName, User
from registry.wire.document import Wire, WireIn

Scope = Annotated[str, Field(max_length=200, description="REPO@CHANNEL, or NAMESPACE/*@CHANNEL for all repositories.")]


class PolicyChange(WireIn):
    """Replaces a policy."""

    kind: Literal["policy"]
    scope: Scope
    policy: dict[str, Any]


class GatesChange(WireIn):
    """Replaces the gate rules of a policy; null keeps them. With `repin`, pins them to the current content of their
    suites."""

    kind: Literal["gates"]
    scope: Scope
    rules: list[Annotated[str, Field(max_length=300)]] | None = Field(default=None, max_length=50)
    repin: bool = False


class ExceptionChange(WireIn):
    """Exempts a repository's channel from its namespace's policy until a time; null ends the exception."""

    kind: Literal["exception"]
    scope: Scope
    until: AwareDatetime | None = None
    reason: str = Field(default="", max_length=1000)


class MemberChange(WireIn):
    """Sets a user's role; null removes it."""

    kind: Literal["member"]
    user: str = User
    role: RoleName | None


class SettingsChange(WireIn):
    """Changes the settings that are given."""

    kind: Literal["settings"]
    settings: NamespaceIn


class RetentionChange(WireIn):
    """Sets the days after which `gc` takes releases down."""

    kind: Literal["retention"]
    retention: RetentionIn


class TakedownChange(WireIn):
    """Takes the files of a release down for good."""

    kind: Literal["takedown"]
    release: str = Field(max_length=200, description="REPO:VERSION.")
    reason: str = Field(min_length=1, max_length=1000)


Change = Annotated[
    PolicyChange | GatesChange | ExceptionChange | MemberChange | SettingsChange | RetentionChange | TakedownChange,
    Field(discriminator="kind"),
]


class ChangeIn(WireIn):
    change: Change


class InboxItem(Wire):
    """A promotion, or a change that needs a second admin, that waits until `expires_at`. `for_you` says whether the
    caller may approve it, and has not."""

    kind: Literal["promotion", "change"]
    id: int
    namespace: str
    subject: str
    summary: str
    waits_for: list[str]
    actor: str
    for_you: bool
    created_at: datetime
    expires_at: datetime


class InboxOut(Wire):
    """What waits, the first to expire first; `more` if that is not all."""

    items: list[InboxItem]
    more: bool


class ChangeOut(Wire):
    """A change that was requested. `before` and `after` are what it replaces; `ended_by` is the admin who approved or
    cancelled it, and `error` says why it ended without effect."""

    id: int
    namespace: str
    summary: str
    change: dict[str, Any]
    before: dict[str, Any]
    after: dict[str, Any]
    state: Literal["pending", "applied", "refused", "conflict", "cancelled", "expired"]
    actor: str
    ended_by: str | None
    error: dict[str, Any] | None
    created_at: datetime
    expires_at: datetime
    ended_at: datetime | None
