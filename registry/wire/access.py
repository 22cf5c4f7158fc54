"""Documents of tokens, namespaces and members."""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field

from registry.wire.document import Wire, WireIn

RoleName = Literal[
    "reader", "agent", "publisher", "releaser", "admin", "publisher+agent", "releaser+agent", "admin+agent"
]
User = Field(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\x7f/*]+$")


class TokenIn(WireIn):
    """`scope` maps namespaces, or `*`, to the highest role there. Without `expires_in_days`, it
    has the registry's default lifetime."""

    user: str | None = Field(default=None, min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\x7f/*]+$")
    name: str = Field(default="", max_length=100)
    scope: dict[str, RoleName] = Field(default={"*": "admin"}, min_length=1, max_length=100)
    expires_in_days: float | None = Field(default=None, gt=0, le=3660)


class TokenOut(Wire):
    id: str
    user: str
    name: str
    scope: dict[str, str]
    created_at: datetime
    created_by: str
    expires_at: datetime | None
    revoked_at: datetime | None
    publisher_id: str | None = Field(description="The trusted publisher whose job it was given to.")
    last_used_at: datetime | None = Field(description="The hour in which it was last used.")
    session: bool = Field(description="Whether it is a browser session, valid only on pages.")
    parent_id: str | None = Field(description="The token that the session was started with; the session ends with it.")


class NewTokenOut(TokenOut):
    """`token` is the secret, shown only once."""

    token: str


class PublisherIn(WireIn):
    """`issuer` is an address, or `github` or `gitlab`; `ref` may end in `*`. `ref`, `environment` or both are needed,
    and on GitHub `workflow`, a file such as `release.yml`. Without `project_id`, the first exchange sets it."""

    issuer: str = Field(max_length=200)
    project: str = Field(max_length=100)
    project_id: str | None = Field(default=None, max_length=20)
    ref: str | None = Field(default=None, max_length=200)
    environment: str | None = Field(default=None, max_length=200)
    workflow: str | None = Field(default=None, max_length=180)


class PublisherOut(Wire):
    """Jobs of `project`, of `workflow`, at `ref` and in `environment` where these are given, may publish in
    `repository`. `exchanges` is false if this registry exchanges no ID tokens."""

    id: str
    repository: str
    issuer: str
    project: str
    project_id: str | None
    ref: str | None
    environment: str | None
    workflow: str | None
    exchanges: bool
    created_at: datetime
    created_by: str


class NamespaceIn(WireIn):
    """Omitted fields stay unchanged. `signing_keys` are PEM public keys; `signature_covers` is what a required
    signature must cover. With `main: release`, `main` serves only releases (only signed ones where signatures are
    required), and commits are drafts on `next`; with `main: commit`, it serves the last commit. The default is
    `release` where signatures are required."""

    public: bool | None = None
    require_signature: bool | None = None
    signing_keys: list[Annotated[str, Field(max_length=2000)]] | None = Field(default=None, max_length=20)
    signature_covers: Literal["release", "files"] | None = None
    main: Literal["release", "commit"] | None = None
    changes: Literal["one", "two"] | None = Field(
        default=None, description="How many admins a change of policies, roles, signing keys and files needs."
    )


Days = Annotated[int, Field(ge=1, le=36_500)]


class QuotaIn(WireIn):
    """The maximum size of the namespace; null for no limit."""

    max_bytes: Annotated[int, Field(ge=0, le=2**62)] | None
    max_releases: Annotated[int, Field(ge=0, le=2**31 - 1)] | None


class RetentionIn(WireIn):
    """Days after which `gc` takes down yanked releases, and pre-releases that no channel serves; null keeps them.
    `keep_channel_days` maps a channel's name to the days after which releases go that it no longer serves, and that no
    channel without such a rule has ever served."""

    keep_yanked_days: Days | None
    keep_prerelease_days: Days | None
    keep_channel_days: dict[Annotated[str, Field(max_length=64)], Days] | None = Field(default=None, max_length=50)


class PlannedRemoval(Wire):
    """A release that retention is about. `reason` is the rule; `spared_by` says why it stays all the same, and is empty
    for one that the next `gc` takes down."""

    release: str
    size_bytes: int
    reason: str
    spared_by: str


class RetentionPlanOut(Wire):
    """What the next `gc` would do; `more` if these are not all."""

    releases: list[PlannedRemoval]
    more: bool


class PersonIn(WireIn):
    """The identity that signs in as the user: the `subject` (`sub`) that the `issuer` assigned; by default, the issuer
    is the server's provider."""

    subject: str = Field(min_length=1, max_length=255)
    issuer: str | None = Field(default=None, min_length=1, max_length=200)


class PersonOut(Wire):
    user: str
    issuer: str
    subject: str


class UserRole(Wire):
    """A role, and its source: a `grant`, which an admin takes back, or the groups of the OpenID provider, in a session
    until it ends."""

    namespace: str
    role: str
    source: Literal["grant", "provider"]
    session: str | None = None
    until: datetime | None = None


class CountingApproval(Wire):
    """An approval that a promotion may still use, if the approver has the role then."""

    channel: str
    version: str
    at: datetime
    reason: str


class UserDetailOut(Wire):
    """`person` is who signs in as the user. `tokens` are those in force, browser sessions among them."""

    user: str
    person: PersonOut | None
    roles: list[UserRole]
    tokens: list[TokenOut]
    approvals: list[CountingApproval]


class UserOut(Wire):
    """The pseudonym of a removed user, and the number of rows in which it replaced the name."""

    user: str
    rows: int


class UsageOut(Wire):
    """The contents of a namespace: bytes of blobs, each counted once, and of announced uploads; releases that have
    files."""

    size_bytes: int
    releases: int
    max_bytes: int | None
    max_releases: int | None


class NamespaceOut(Wire):
    namespace: str
    public: bool
    require_signature: bool
    signing_keys: list[str]
    signature_covers: Literal["release", "files"]
    main: Literal["release", "commit"]
    max_bytes: int | None
    max_releases: int | None
    keep_yanked_days: int | None
    keep_prerelease_days: int | None
    keep_channel_days: dict[str, int] | None = None
    changes: Literal["one", "two"] = "one"
    created_at: datetime
    created_by: str


class MemberIn(WireIn):
    """A null `role` removes the role."""

    user: str = User
    role: RoleName | None


class MembersOut(Wire):
    """Roles by user."""

    members: dict[str, str]


class WhoOut(Wire):
    """The user and the roles that the token allows; `limited` are the user's own roles where the token's scope allows
    less or none."""

    user: str
    token: str | None
    grants: dict[str, str]
    limited: dict[str, str]
