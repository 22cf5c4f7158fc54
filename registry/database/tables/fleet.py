"""The fleet: nodes that serve channels, as they reported last, and canaries with their figures."""

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, BigInteger, ForeignKey, Index, String, UniqueConstraint, false, text
from sqlalchemy.orm import Mapped, mapped_column, relationship

from registry.database.engine import Row, UtcDateTime
from registry.database.tables.catalog import Id, Release


class FleetNode(Row):
    """The last report of a group's node about one namespace. Nodes of two namespaces are different nodes even if
    their names are equal. `servers` has only the loaded names of the namespace; `digest` is a sha256 of the report. The
    node may switch until `switch_until`; None without the permission. `instances` are the processes that reported last,
    the newest last; two of them report in turn until `shared_until`, None if none do."""

    __tablename__ = "fleet_nodes"
    __table_args__ = (UniqueConstraint("namespace", "group", "node"),)

    id: Mapped[int] = mapped_column(Id, primary_key=True)
    namespace: Mapped[str] = mapped_column(String(64))
    group: Mapped[str] = mapped_column(String(100))
    node: Mapped[str] = mapped_column(String(100))
    agent: Mapped[str] = mapped_column(String(100))
    servers: Mapped[list[dict[str, Any]]] = mapped_column(JSON)
    digest: Mapped[str] = mapped_column(String(64))
    seen_at: Mapped[datetime] = mapped_column(UtcDateTime, index=True)
    switch_until: Mapped[datetime | None] = mapped_column(UtcDateTime)
    instances: Mapped[list[str] | None] = mapped_column(JSON(none_as_null=True))
    shared_until: Mapped[datetime | None] = mapped_column(UtcDateTime)


class FleetChannel(Row):
    """A channel that a node follows. It need not exist any more. `version`, `commit` and `move` are what the node gives
    users, None for nothing."""

    __tablename__ = "fleet_channels"
    __table_args__ = (Index("ix_fleet_channels_name", "repository", "channel"),)

    node_id: Mapped[int] = mapped_column(ForeignKey("fleet_nodes.id", ondelete="CASCADE"), primary_key=True)
    repository: Mapped[str] = mapped_column(String(64), primary_key=True)
    channel: Mapped[str] = mapped_column(String(64), primary_key=True)
    state: Mapped[str] = mapped_column(String(16))
    splits: Mapped[bool] = mapped_column(server_default=false())
    version: Mapped[str | None] = mapped_column(String(100))
    commit: Mapped[str | None] = mapped_column(String(40))
    move: Mapped[int | None] = mapped_column(BigInteger)
    since: Mapped[datetime] = mapped_column(UtcDateTime)
    check: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    error: Mapped[str | None]


class FleetRelease(Row):
    """A release that a node has loaded or gives users."""

    __tablename__ = "fleet_releases"

    node_id: Mapped[int] = mapped_column(ForeignKey("fleet_nodes.id", ondelete="CASCADE"), primary_key=True)
    release_id: Mapped[int] = mapped_column(ForeignKey("releases.id"), primary_key=True, index=True)


RUNNING = "running"
"""The state of a canary that gets requests."""


class Canary(Row):
    """A release that gets `weight` per cent of a channel's requests, beside the one that the channel serves. It ends
    when the channel serves another one. `watch` is the policy's at the beginning, None for none; `totals` has the
    figures of the candidate and of the served release, of all sources, and `report` the standing of its rules. `state`
    is running, promoted, rolled_back, stopped or replaced; `why` says how it ended, or what holds it."""

    __tablename__ = "canaries"
    __table_args__ = (
        Index(
            "uq_canaries_running",
            "channel_id",
            unique=True,
            sqlite_where=text("state = 'running'"),
            postgresql_where=text("state = 'running'"),
        ),
    )

    id: Mapped[int] = mapped_column(Id, primary_key=True)
    channel_id: Mapped[int] = mapped_column(ForeignKey("channels.id"), index=True)
    served_id: Mapped[int] = mapped_column(ForeignKey("releases.id"))
    release_id: Mapped[int] = mapped_column(ForeignKey("releases.id"), index=True)
    weight: Mapped[int]
    watch: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    state: Mapped[str] = mapped_column(String(16))
    why: Mapped[str] = mapped_column(default="")
    totals: Mapped[list[dict[str, Any]] | None] = mapped_column(JSON(none_as_null=True))
    report: Mapped[list[dict[str, Any]]] = mapped_column(JSON)
    actor: Mapped[str] = mapped_column(String(128))
    token_id: Mapped[str | None] = mapped_column(String(16))
    source: Mapped[str | None] = mapped_column(String(200))
    reason: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    step_at: Mapped[datetime] = mapped_column(UtcDateTime)
    figures_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    ended_at: Mapped[datetime | None] = mapped_column(UtcDateTime)

    release: Mapped[Release] = relationship(foreign_keys=release_id)
    served: Mapped[Release] = relationship(foreign_keys=served_id)


class CanaryFigures(Row):
    """The counts of one source, by version, since it started: at its first report (`first`) and at its last. The
    difference is the canary's. Two users who name a source alike have two sources."""

    __tablename__ = "canary_figures"

    canary_id: Mapped[int] = mapped_column(ForeignKey("canaries.id", ondelete="CASCADE"), primary_key=True)
    reporter: Mapped[str] = mapped_column(String(128), primary_key=True, server_default=text("''"))
    source: Mapped[str] = mapped_column(String(200), primary_key=True)
    first: Mapped[dict[str, Any]] = mapped_column(JSON)
    last: Mapped[dict[str, Any]] = mapped_column(JSON)
    at: Mapped[datetime] = mapped_column(UtcDateTime)
