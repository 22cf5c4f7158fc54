"""Namespaces, their members, and tokens."""

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, BigInteger, Index, String, UniqueConstraint, false
from sqlalchemy.orm import Mapped, mapped_column

from registry.database.engine import Row, UtcDateTime


class Namespace(Row):
    """The unit of permission. Releases must be signed by one of `signing_keys` (public keys, PEM), if any.
    `signature_covers` is the required extent of a signature: the `release`, or its `files` alone. `main` determines
    what hub clients get as `main`: a `release` or the last `commit`; None is the default. `max_bytes` and
    `max_releases` are
    its quota, None without one. After `keep_yanked_days` and `keep_prerelease_days` the files of yanked releases and of
    pre-releases are removed, and after `keep_channel_days`, by the name of a channel, those of releases that only such
    channels have served; None keeps them. `changes` is how many admins a change of its rules needs: `one` or
    `two`."""

    __tablename__ = "namespaces"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    public: Mapped[bool] = mapped_column(index=True)
    require_signature: Mapped[bool]
    signing_keys: Mapped[list[str]] = mapped_column(JSON)
    signature_covers: Mapped[str] = mapped_column(String(16), default="release", server_default="release")
    main: Mapped[str | None] = mapped_column(String(16))
    max_bytes: Mapped[int | None] = mapped_column(BigInteger)
    max_releases: Mapped[int | None] = mapped_column(BigInteger)
    keep_yanked_days: Mapped[int | None]
    keep_prerelease_days: Mapped[int | None]
    keep_channel_days: Mapped[dict[str, int] | None] = mapped_column(JSON(none_as_null=True))
    changes: Mapped[str] = mapped_column(String(8), default="one", server_default="one")
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    created_by: Mapped[str] = mapped_column(String(128))


class Member(Row):
    """One user's role in one namespace, or in all if `namespace` is `*` (so it is not a foreign key)."""

    __tablename__ = "members"

    user: Mapped[str] = mapped_column(String(128), primary_key=True)
    namespace: Mapped[str] = mapped_column(String(64), primary_key=True, index=True)
    role: Mapped[str] = mapped_column(String(16))


class KeptAnswer(Row):
    """The stored answer to a request with an idempotency key. `request` is the sha256 of its content."""

    __tablename__ = "kept_answers"

    user: Mapped[str] = mapped_column(String(128), primary_key=True)
    key: Mapped[str] = mapped_column(String(64), primary_key=True)
    request: Mapped[str] = mapped_column(String(64))
    answer: Mapped[dict[str, Any]] = mapped_column(JSON)
    at: Mapped[datetime] = mapped_column(UtcDateTime, index=True)


class Token(Row):
    """A secret that acts for a user, kept as its sha256. `scope` maps namespaces, or `*`, to its highest role there.

    A token of a trusted publisher (`publisher_id`) has no user's roles: its `scope` are its rights, as long as the rule
    exists. `last_used_at` is exact to the hour.

    A browser session (`session`) is valid on pages alone. `parent_id` is the token that began the session, which it
    does not outlive; without one, an OpenID provider began it. Its user then has, besides their own roles,
    `session_roles`, which map namespaces to roles.
    """

    __tablename__ = "tokens"

    id: Mapped[str] = mapped_column(String(16), primary_key=True)
    user: Mapped[str] = mapped_column(String(128), index=True)
    name: Mapped[str] = mapped_column(String(100))
    secret_sha256: Mapped[str] = mapped_column(String(64))
    scope: Mapped[dict[str, Any]] = mapped_column(JSON)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    created_by: Mapped[str] = mapped_column(String(128))
    expires_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    revoked_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    publisher_id: Mapped[str | None] = mapped_column(String(16))
    last_used_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    session: Mapped[bool] = mapped_column(default=False, server_default=false())
    parent_id: Mapped[str | None] = mapped_column(String(16), index=True)
    session_roles: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))


class ProviderUser(Row):
    """A user who signs in through an OpenID provider, which identifies the person by `subject`; the provider's name may
    change."""

    __tablename__ = "provider_users"
    __table_args__ = (UniqueConstraint("issuer", "subject"),)

    user: Mapped[str] = mapped_column(String(128), primary_key=True)
    issuer: Mapped[str] = mapped_column(String(200))
    subject: Mapped[str] = mapped_column(String(255))


class TrustedPublisher(Row):
    """A rule: jobs of this project and workflow, at this ref and in this environment, may publish in one repository.

    The repository need not exist yet. `project_id` is the issuer's own number of the project, set by the first
    exchange; another project that later gets the same name has a different one. `workflow` is the file of its jobs;
    rules from before migration 0022 have none, and allow any. Ids are random, so that no token of a removed rule
    belongs to a later one.
    """

    __tablename__ = "trusted_publishers"
    __table_args__ = (Index("ix_trusted_publishers_namespace", "namespace", "repository"),)

    id: Mapped[str] = mapped_column(String(16), primary_key=True)
    namespace: Mapped[str] = mapped_column(String(64))
    repository: Mapped[str] = mapped_column(String(64))
    issuer: Mapped[str] = mapped_column(String(200), index=True)
    project: Mapped[str] = mapped_column(String(100))
    project_id: Mapped[str | None] = mapped_column(String(64))
    ref: Mapped[str | None] = mapped_column(String(200))
    environment: Mapped[str | None] = mapped_column(String(200))
    workflow: Mapped[str | None] = mapped_column(String(200))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    created_by: Mapped[str] = mapped_column(String(128))


class UsedIdToken(Row):
    """An ID token that was exchanged, by the sha256 of its issuer and id, until it expires."""

    __tablename__ = "used_id_tokens"

    sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime, index=True)
