"""the hash chain of the audit log"""

import sqlalchemy as sa
from alembic import op

revision = "0031"
down_revision = "0030"
oldest_code = "0018"


def upgrade() -> None:
    op.create_table(
        "audit_seals",
        sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("audit_id", sa.BigInteger, nullable=False),
        sa.Column("content", sa.String(64), nullable=False),
        sa.Column("removal", sa.BigInteger),
        sa.Column("digest", sa.String(64), nullable=False),
    )
    op.create_index("ix_audit_seals_audit_id", "audit_seals", ["audit_id"])
