"""conflict checks that are kept"""

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"


def upgrade() -> None:
    op.create_table(
        "conflict_checks",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("key", sa.String(64), nullable=False),
        sa.Column("job_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=True),
        sa.Column("lock", sa.JSON(), nullable=False),
        sa.Column("report", sa.JSON(), nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_conflict_checks_job_id_jobs")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_conflict_checks")),
        sa.UniqueConstraint("key", name=op.f("uq_conflict_checks_key")),
        sa.UniqueConstraint("job_id", name=op.f("uq_conflict_checks_job_id")),
    )
