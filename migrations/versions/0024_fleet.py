"""what nodes that serve channels report"""

import sqlalchemy as sa
from alembic import op

revision = "0024"
down_revision = "0023"
oldest_code = "0018"

_ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    op.create_table(
        "fleet_nodes",
        sa.Column("id", _ID, nullable=False),
        sa.Column("namespace", sa.String(64), nullable=False),
        sa.Column("group", sa.String(100), nullable=False),
        sa.Column("node", sa.String(100), nullable=False),
        sa.Column("agent", sa.String(100), nullable=False),
        sa.Column("servers", sa.JSON, nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("seen_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("switch_until", sa.DateTime(timezone=True)),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_fleet_nodes")),
        sa.UniqueConstraint("namespace", "group", "node", name=op.f("uq_fleet_nodes_namespace_group_node")),
    )
    op.create_index("ix_fleet_nodes_seen_at", "fleet_nodes", ["seen_at"])
    op.create_table(
        "fleet_channels",
        sa.Column("node_id", _ID, nullable=False),
        sa.Column("repository", sa.String(64), nullable=False),
        sa.Column("channel", sa.String(64), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("version", sa.String(100)),
        sa.Column("commit", sa.String(40)),
        sa.Column("move", sa.BigInteger),
        sa.Column("since", sa.DateTime(timezone=True), nullable=False),
        sa.Column("check", sa.JSON),
        sa.Column("error", sa.String),
        sa.PrimaryKeyConstraint("node_id", "repository", "channel", name=op.f("pk_fleet_channels")),
        sa.ForeignKeyConstraint(
            ["node_id"], ["fleet_nodes.id"], name=op.f("fk_fleet_channels_node_id"), ondelete="CASCADE"
        ),
    )
    op.create_index("ix_fleet_channels_name", "fleet_channels", ["repository", "channel"])
    op.create_table(
        "fleet_releases",
        sa.Column("node_id", _ID, nullable=False),
        sa.Column("release_id", _ID, nullable=False),
        sa.PrimaryKeyConstraint("node_id", "release_id", name=op.f("pk_fleet_releases")),
        sa.ForeignKeyConstraint(
            ["node_id"], ["fleet_nodes.id"], name=op.f("fk_fleet_releases_node_id"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(["release_id"], ["releases.id"], name=op.f("fk_fleet_releases_release_id")),
    )
    op.create_index("ix_fleet_releases_release_id", "fleet_releases", ["release_id"])
