"""what a store verifies, probed once and kept for all processes"""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    op.create_table(
        "store_facts",
        sa.Column("endpoint", sa.String(300), nullable=False),
        sa.Column("bucket", sa.String(255), nullable=False),
        sa.Column("version", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("facts", sa.JSON(), nullable=False),
        sa.Column("probed_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("endpoint", "bucket", "version", name=op.f("pk_store_facts")),
    )
