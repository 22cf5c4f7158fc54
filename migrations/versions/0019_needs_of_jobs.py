"""what jobs need and workers offer, and priorities of jobs"""

import sqlalchemy as sa
from alembic import op

revision = "0019"
down_revision = "0018"
oldest_code = "0018"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("priority", sa.SmallInteger, nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("memory_bytes", sa.BigInteger))
    op.create_table(
        "job_needs",
        sa.Column("job_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("need", sa.String(80), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_job_needs_job_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "need", name=op.f("pk_job_needs")),
    )
    op.create_table(
        "workers",
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("seen_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("kinds", sa.JSON, nullable=False),
        sa.Column("offers", sa.JSON, nullable=False),
        sa.Column("memory_bytes", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_workers")),
    )
