"""canaries, their figures, and the nodes that split requests for them"""

import sqlalchemy as sa
from alembic import op

revision = "0027"
down_revision = "0026"
oldest_code = "0018"

_ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    with op.batch_alter_table("fleet_channels") as table:
        table.add_column(sa.Column("splits", sa.Boolean, nullable=False, server_default=sa.false()))
    op.create_table(
        "canaries",
        sa.Column("id", _ID, nullable=False),
        sa.Column("channel_id", _ID, nullable=False),
        sa.Column("served_id", _ID, nullable=False),
        sa.Column("release_id", _ID, nullable=False),
        sa.Column("weight", sa.Integer, nullable=False),
        sa.Column("watch", sa.JSON),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("why", sa.String, nullable=False),
        sa.Column("report", sa.JSON, nullable=False),
        sa.Column("actor", sa.String(128), nullable=False),
        sa.Column("token_id", sa.String(16)),
        sa.Column("source", sa.String(200)),
        sa.Column("reason", sa.String, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("step_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("figures_at", sa.DateTime(timezone=True)),
        sa.Column("ended_at", sa.DateTime(timezone=True)),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_canaries")),
        sa.ForeignKeyConstraint(["channel_id"], ["channels.id"], name=op.f("fk_canaries_channel_id")),
        sa.ForeignKeyConstraint(["served_id"], ["releases.id"], name=op.f("fk_canaries_served_id")),
        sa.ForeignKeyConstraint(["release_id"], ["releases.id"], name=op.f("fk_canaries_release_id")),
    )
    op.create_index("ix_canaries_channel_id", "canaries", ["channel_id"])
    op.create_index("ix_canaries_release_id", "canaries", ["release_id"])
    op.create_index(
        "uq_canaries_running",
        "canaries",
        ["channel_id"],
        unique=True,
        sqlite_where=sa.text("state = 'running'"),
        postgresql_where=sa.text("state = 'running'"),
    )
    op.create_table(
        "canary_figures",
        sa.Column("canary_id", _ID, nullable=False),
        sa.Column("source", sa.String(200), nullable=False),
        sa.Column("first", sa.JSON, nullable=False),
        sa.Column("last", sa.JSON, nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("canary_id", "source", name=op.f("pk_canary_figures")),
        sa.ForeignKeyConstraint(
            ["canary_id"], ["canaries.id"], name=op.f("fk_canary_figures_canary_id"), ondelete="CASCADE"
        ),
    )
