"""The fleet: nodes that serve channels, as they reported last."""

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, BigInteger, ForeignKey, Index, String, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from registry.database.engine import Row, UtcDateTime
from registry.database.tables.catalog import Id


class FleetNode(Row):
    """What a node of a group reported last about one namespace. Nodes of two namespaces are different nodes even if
    their names are equal. `servers` has only the loaded names of the namespace; `digest` is a sha256 of the report. The
    node may switch until `switch_until`; None without the permission."""

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


class FleetChannel(Row):
    """A channel that a node follows. It need not exist any more. `version`, `commit` and `move` are what the node gives
    users, None for nothing."""

    __tablename__ = "fleet_channels"
    __table_args__ = (Index("ix_fleet_channels_name", "repository", "channel"),)

    node_id: Mapped[int] = mapped_column(ForeignKey("fleet_nodes.id", ondelete="CASCADE"), primary_key=True)
    repository: Mapped[str] = mapped_column(String(64), primary_key=True)
    channel: Mapped[str] = mapped_column(String(64), primary_key=True)
    state: Mapped[str] = mapped_column(String(16))
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
