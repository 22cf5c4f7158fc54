"""policies of channels, promotions that wait, approvals, evaluations by workers; deprecations and licences

Gates of before are rules alone, and are read as a policy that refuses what lacks a score.
"""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"

ROW_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.add_column("gates", sa.Column("policy", sa.JSON()))
    op.add_column("gates", sa.Column("revision", sa.Integer(), nullable=False, server_default="1"))
    op.add_column("scores", sa.Column("reported", sa.Boolean(), nullable=False, server_default=sa.false()))
    for table, length in (("bases", 64), ("releases", 300)):
        op.add_column(table, sa.Column("deprecated_reason", sa.String()))
        op.add_column(table, sa.Column("successor", sa.String(length)))
    op.add_column("bases", sa.Column("license", sa.String(100)))
    op.create_table(
        "promotions",
        sa.Column("id", ROW_ID, nullable=False),
        sa.Column("channel_id", ROW_ID, nullable=False),
        sa.Column("release_id", ROW_ID, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("expected_move", ROW_ID, nullable=False),
        sa.Column("actor", sa.String(128), nullable=False),
        sa.Column("token_id", sa.String(16)),
        sa.Column("source", sa.String(200)),
        sa.Column("reason", sa.String(), nullable=False),
        sa.Column("gates", sa.JSON(), nullable=False),
        sa.Column("job_id", ROW_ID),
        sa.Column("move_id", ROW_ID),
        sa.Column("error", sa.JSON()),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("due_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True)),
        sa.ForeignKeyConstraint(["channel_id"], ["channels.id"], name=op.f("fk_promotions_channel_id_channels")),
        sa.ForeignKeyConstraint(["release_id"], ["releases.id"], name=op.f("fk_promotions_release_id_releases")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_promotions_job_id_jobs")),
        sa.ForeignKeyConstraint(["move_id"], ["moves.id"], name=op.f("fk_promotions_move_id_moves")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_promotions")),
    )
    pending = sa.text("state = 'pending'")
    op.create_index(
        "uq_promotions_channel_id",
        "promotions",
        ["channel_id"],
        unique=True,
        sqlite_where=pending,
        postgresql_where=pending,
    )
    op.create_index("ix_promotions_channel_id", "promotions", ["channel_id", "id"])
    op.create_index("ix_promotions_state", "promotions", ["state", "due_at"])
    op.create_table(
        "approvals",
        sa.Column("release_id", ROW_ID, nullable=False),
        sa.Column("channel", sa.String(64), nullable=False),
        sa.Column("user", sa.String(128), nullable=False),
        sa.Column("token_id", sa.String(16)),
        sa.Column("reason", sa.String(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["release_id"], ["releases.id"], name=op.f("fk_approvals_release_id_releases")),
        sa.PrimaryKeyConstraint("release_id", "channel", "user", name=op.f("pk_approvals")),
    )
    op.create_table(
        "evaluations",
        sa.Column("job_id", ROW_ID, autoincrement=False, nullable=False),
        sa.Column("token_id", sa.String(16)),
        sa.Column("source", sa.String(200)),
        sa.Column("wanted", sa.JSON(), nullable=False),
        sa.Column("results", sa.JSON(), nullable=False),
        sa.Column("upgrade", sa.JSON()),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_evaluations_job_id_jobs")),
        sa.PrimaryKeyConstraint("job_id", name=op.f("pk_evaluations")),
    )
