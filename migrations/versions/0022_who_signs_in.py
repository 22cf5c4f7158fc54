"""people by their provider's subject, workflows of trusted publishers, and what permits of uploads stand on"""

import sqlalchemy as sa
from alembic import op

revision = "0022"
down_revision = "0021"
oldest_code = "0018"


def upgrade() -> None:
    op.create_table(
        "provider_users",
        sa.Column("user", sa.String(128), nullable=False),
        sa.Column("issuer", sa.String(200), nullable=False),
        sa.Column("subject", sa.String(255), nullable=False),
        sa.PrimaryKeyConstraint("user", name=op.f("pk_provider_users")),
        sa.UniqueConstraint("issuer", "subject", name=op.f("uq_provider_users_issuer_subject")),
    )
    op.add_column("trusted_publishers", sa.Column("workflow", sa.String(200)))
    op.add_column("xet_uploads", sa.Column("token_id", sa.String(16)))
    op.add_column("uploads", sa.Column("permit_key", sa.String(64)))
