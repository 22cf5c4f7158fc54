"""Suites and scores, channels, their moves, policies and waiting promotions."""

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, CheckConstraint, ForeignKey, Index, String, Text, UniqueConstraint, false, text, true
from sqlalchemy.orm import Mapped, mapped_column, relationship

from registry.database.engine import Row, UtcDateTime
from registry.database.tables.catalog import ByteOrdered, Id, Release


class WorkerKey(Row):
    """The public half of a worker's key; `id` is the sha256 of its DER. What a revoked key signed counts as stated, not
    as measured."""

    __tablename__ = "worker_keys"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    worker: Mapped[str] = mapped_column(String(64))
    public_key: Mapped[str] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    revoked_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    revoked_by: Mapped[str | None] = mapped_column(String(128))


class Attestation(Row):
    """A verified attestation about a release, or about a base alone; `suite_id` is the suite that was measured. The
    envelope of evidence has the token ids of examples."""

    __tablename__ = "attestations"
    __table_args__ = (Index("ix_attestations_release", "release_id", "predicate_type", "id"),)

    id: Mapped[int] = mapped_column(Id, primary_key=True)
    key_id: Mapped[str] = mapped_column(ForeignKey("worker_keys.id"), index=True)
    predicate_type: Mapped[str] = mapped_column(String(100))
    release_id: Mapped[int | None] = mapped_column(ForeignKey("releases.id"))
    base_digest: Mapped[str | None] = mapped_column(ForeignKey("bases.digest"))
    suite_id: Mapped[int | None] = mapped_column(ForeignKey("suites.id"))
    envelope: Mapped[str] = mapped_column(Text, deferred=True)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    key: Mapped[WorkerKey] = relationship(lazy="joined", innerjoin=True)


class SuiteVersion(Row):
    """One content of a suite: a changed example results in another digest under the same name. The last one added is
    current. A `version` labels one content of its name.

    A name acme/sql belongs to the namespace `acme`, and its examples are for those who may read there, unless it is
    `shared` with all. A name without a namespace is shared."""

    __tablename__ = "suites"
    __table_args__ = (
        # The migrations give PostgreSQL the same condition: naming it here would import its dialect on SQLite, too.
        Index("uq_suites_name", "name", unique=True, sqlite_where=text("current")),
        Index("uq_suites_version", "name", "version", unique=True),
    )

    id: Mapped[int] = mapped_column(Id, primary_key=True)
    name: Mapped[str] = mapped_column(String(64))
    namespace: Mapped[str | None] = mapped_column(String(64))
    shared: Mapped[bool] = mapped_column(server_default=true())
    digest: Mapped[str] = mapped_column(String(64), unique=True)
    version: Mapped[str | None] = mapped_column(String(80))
    kind: Mapped[str] = mapped_column(String(16))
    task: Mapped[str] = mapped_column(String(32), server_default="teacher_forced")
    examples: Mapped[int]
    content: Mapped[dict[str, Any]] = mapped_column(JSON, deferred=True)
    current: Mapped[bool]
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    created_by: Mapped[str] = mapped_column(String(128))


class SuiteMetric(Row):
    """The direction of a metric, for all versions of the suite of that name. Everyone may read a direction `stated` in
    the suite's file. A direction fixed by the author's score is visible only to users who may read a score of the
    metric."""

    __tablename__ = "suite_metrics"

    suite: Mapped[str] = mapped_column(String(64), primary_key=True)
    metric: Mapped[str] = mapped_column(String(64), primary_key=True)
    higher_is_better: Mapped[bool]
    stated: Mapped[bool]
    by: Mapped[str] = mapped_column(String(128))
    at: Mapped[datetime] = mapped_column(UtcDateTime)


class Score(Row):
    """One metric of one suite for one release or one base. A new measurement replaces it, and the audit log keeps both.
    `traits_id` is the release's: servers before 0.2 read it and its index, which can go once no server does.
    `results_sha256` is the blob with the results of each example, if these were recorded. `reported` scores are claims:
    no evaluation measured them on the suite, and their `n` is 0 if unknown.
    `source` is the harness that measured it, with its version, or the file that reports it. `attestation_id` is that of
    the worker that measured it; not a foreign key, which SQLite cannot add to a table."""

    __tablename__ = "scores"
    __table_args__ = (
        UniqueConstraint("release_id", "suite_id", "metric"),
        UniqueConstraint("base_digest", "suite_id", "metric"),
        Index("ix_scores_of_release", "release_id", "suite_id", "metric", "value"),
        # Best first, for releases with the same traits and for all.
        Index("ix_scores_traits_best", "suite_id", "metric", "traits_id", "value", "release_id"),
        Index("ix_scores_best", "suite_id", "metric", "value", "release_id"),
        Index("ix_scores_results", "results_sha256"),
        CheckConstraint("(release_id IS NULL) <> (base_digest IS NULL)", name="one_subject"),
    )

    id: Mapped[int] = mapped_column(Id, primary_key=True)
    release_id: Mapped[int | None] = mapped_column(ForeignKey("releases.id"))
    traits_id: Mapped[int | None] = mapped_column(ForeignKey("traits.id"))
    base_digest: Mapped[str | None] = mapped_column(ForeignKey("bases.digest"))
    suite_id: Mapped[int] = mapped_column(ForeignKey("suites.id"))
    metric: Mapped[str] = mapped_column(String(64))
    value: Mapped[float]
    stderr: Mapped[float | None]
    n: Mapped[int]
    higher_is_better: Mapped[bool]
    results_sha256: Mapped[str | None] = mapped_column(String(64))
    reported: Mapped[bool] = mapped_column(default=False, server_default=false())
    source: Mapped[str | None] = mapped_column(String(300))
    provenance: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)  # unused, to be dropped
    measured_at: Mapped[datetime] = mapped_column(UtcDateTime)
    measured_by: Mapped[str] = mapped_column(String(128))
    attestation_id: Mapped[int | None] = mapped_column(Id)
    suite: Mapped[SuiteVersion] = relationship(lazy="joined", innerjoin=True)
    attestation: Mapped[Attestation | None] = relationship(
        lazy="joined", primaryjoin="foreign(Score.attestation_id) == Attestation.id"
    )

    @property
    def worker(self) -> str | None:
        """The worker that measured it; None if somebody stated it, or if the worker's key is revoked."""
        key = self.attestation.key if self.attestation else None
        return key.worker if key and key.revoked_at is None else None


class Channel(Row):
    """A movable pointer. `move_id` is its last move and its ETag (not a foreign key: each table would have to come
    first).

    `served_id` is the release that it serves: that of the last move or, if that is yanked, what a rollback would
    return to; None if there is nothing. `served_key` is that release's sort key, which servers before 0.2 read.
    """

    __tablename__ = "channels"
    __table_args__ = (
        UniqueConstraint("repository_id", "name"),
        Index("ix_channels_newest", "name", "served_id"),
        Index("ix_channels_version", "name", "served_key", "served_id"),
    )

    id: Mapped[int] = mapped_column(Id, primary_key=True)
    repository_id: Mapped[int] = mapped_column(ForeignKey("repositories.id"))
    name: Mapped[str] = mapped_column(String(64))
    move_id: Mapped[int | None] = mapped_column(Id)
    served_id: Mapped[int | None] = mapped_column(Id)
    served_key: Mapped[str | None] = mapped_column(ByteOrdered)


class Move(Row):
    """One step of a channel; rows are only ever added.

    `below_id` is the move that a rollback from here returns to. Promotion puts a move on top of the current one; a
    rollback to move M stands where M stood (`below_id` of M), so that rolling back again goes further back.
    """

    __tablename__ = "moves"

    id: Mapped[int] = mapped_column(Id, primary_key=True)
    channel_id: Mapped[int] = mapped_column(ForeignKey("channels.id"), index=True)
    kind: Mapped[str] = mapped_column(String(16))
    from_release_id: Mapped[int | None] = mapped_column(ForeignKey("releases.id"))
    to_release_id: Mapped[int] = mapped_column(ForeignKey("releases.id"))
    below_id: Mapped[int | None] = mapped_column(ForeignKey("moves.id"))
    actor: Mapped[str] = mapped_column(String(128))
    reason: Mapped[str]
    forced: Mapped[bool]
    gates: Mapped[list[dict[str, Any]]] = mapped_column(JSON)
    at: Mapped[datetime] = mapped_column(UtcDateTime)
    from_release: Mapped[Release | None] = relationship(foreign_keys=[from_release_id])
    to_release: Mapped[Release] = relationship(foreign_keys=[to_release_id], lazy="joined", innerjoin=True)


class Gate(Row):
    """The policy of one channel of one repository, in the form of `registry.formats.channel_policy`. `revision` counts
    its changes. `rules` are its gate rules, for processes older than `policy`; without a `policy`, they are all of it.
    `pins` has, by suite, what the rules were set on: the `digest` of its content, and by metric whether
    `higher_is_better`."""

    __tablename__ = "gates"

    repository_id: Mapped[int] = mapped_column(ForeignKey("repositories.id"), primary_key=True)
    channel: Mapped[str] = mapped_column(String(64), primary_key=True)
    rules: Mapped[list[str]] = mapped_column(JSON)
    policy: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    revision: Mapped[int] = mapped_column(default=1, server_default="1")
    pins: Mapped[dict[str, Any] | None] = mapped_column(JSON)


class NamespacePolicy(Row):
    """The policy of the channels of one name in all repositories of a namespace, also those made later. The columns are
    those of `Gate`."""

    __tablename__ = "namespace_policies"

    namespace: Mapped[str] = mapped_column(ForeignKey("namespaces.name"), primary_key=True)
    channel: Mapped[str] = mapped_column(String(64), primary_key=True)
    policy: Mapped[dict[str, Any]] = mapped_column(JSON)
    revision: Mapped[int]
    pins: Mapped[dict[str, Any]] = mapped_column(JSON)


class PolicyException(Row):
    """Exempts a channel of one repository from its namespace's policy until a time. A new one replaces it."""

    __tablename__ = "policy_exceptions"

    repository_id: Mapped[int] = mapped_column(ForeignKey("repositories.id"), primary_key=True)
    channel: Mapped[str] = mapped_column(String(64), primary_key=True)
    until: Mapped[datetime] = mapped_column(UtcDateTime)
    reason: Mapped[str] = mapped_column(String(1000))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    created_by: Mapped[str] = mapped_column(String(128))


class ChangeRequest(Row):
    """A change of a namespace that one admin requested and that applies when a second one approves it.

    pending -> applied | refused | conflict | cancelled | expired. `change` is its document. `before` and `after` are
    what it replaces, as they were when it was requested.
    """

    __tablename__ = "change_requests"
    __table_args__ = (Index("ix_change_requests_namespace", "namespace", "state"),)

    id: Mapped[int] = mapped_column(Id, primary_key=True)
    namespace: Mapped[str] = mapped_column(ForeignKey("namespaces.name"))
    change: Mapped[dict[str, Any]] = mapped_column(JSON)
    before: Mapped[dict[str, Any]] = mapped_column(JSON)
    after: Mapped[dict[str, Any]] = mapped_column(JSON)
    state: Mapped[str] = mapped_column(String(16))
    actor: Mapped[str] = mapped_column(String(128))
    token_id: Mapped[str | None] = mapped_column(String(16))
    source: Mapped[str | None] = mapped_column(String(200))
    ended_by: Mapped[str | None] = mapped_column(String(128))
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime)
    ended_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class Promotion(Row):
    """A promotion that waits, or has waited, for something: scores, a soak, an approval.

    pending -> completed | refused | conflict | replaced | cancelled | expired. A channel has at most one that is
    pending. It completes only while the channel is at `expected_move` (0 for no move yet). `gates` is the last report;
    `due_at` is when it is next judged again; `error` tells why it ended without a move.
    """

    __tablename__ = "promotions"
    __table_args__ = (
        Index(
            "uq_promotions_channel_id",
            "channel_id",
            unique=True,
            sqlite_where=text("state = 'pending'"),
        ),
        Index("ix_promotions_channel_id", "channel_id", "id"),
        Index("ix_promotions_state", "state", "due_at"),
    )

    id: Mapped[int] = mapped_column(Id, primary_key=True)
    channel_id: Mapped[int] = mapped_column(ForeignKey("channels.id"))
    release_id: Mapped[int] = mapped_column(ForeignKey("releases.id"))
    state: Mapped[str] = mapped_column(String(16))
    expected_move: Mapped[int] = mapped_column(Id)
    actor: Mapped[str] = mapped_column(String(128))
    token_id: Mapped[str | None] = mapped_column(String(16))
    source: Mapped[str | None] = mapped_column(String(200))
    reason: Mapped[str]
    gates: Mapped[list[dict[str, Any]]] = mapped_column(JSON)
    job_id: Mapped[int | None] = mapped_column(ForeignKey("jobs.id"))
    move_id: Mapped[int | None] = mapped_column(ForeignKey("moves.id"))
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    due_at: Mapped[datetime] = mapped_column(UtcDateTime)
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime)
    ended_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    channel: Mapped[Channel] = relationship(lazy="joined", innerjoin=True)
    release: Mapped[Release] = relationship(lazy="joined", innerjoin=True)


class Approval(Row):
    """An approval of a release for one channel of its repository. `token_id` is None for a registry without
    tokens. `after_move` is the channel's last move when it was given, 0 before the first: the next one to the release
    uses the approval up."""

    __tablename__ = "approvals"

    release_id: Mapped[int] = mapped_column(ForeignKey("releases.id"), primary_key=True)
    channel: Mapped[str] = mapped_column(String(64), primary_key=True)
    user: Mapped[str] = mapped_column(String(128), primary_key=True)
    token_id: Mapped[str | None] = mapped_column(String(16))
    reason: Mapped[str]
    at: Mapped[datetime] = mapped_column(UtcDateTime)
    after_move: Mapped[int] = mapped_column(Id, default=0, server_default="0")
